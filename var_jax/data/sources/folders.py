"""Trees of image files with one folder for each class, local or in a bucket."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from var_jax import BadInput
from var_jax.data.decoding import is_image
from var_jax.data.sources.base import EncodedImages, split_indices
from var_jax.data.sources.imagenet import readable
from var_jax.tools.files import in_bucket

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"
)  # fmt: skip
VALIDATION = ("validation", "valid", "val")


def open_folders(folder: epath.Path, split: str) -> EncodedImages:
    """A tree of train/CLASS/*.jpg and validation/CLASS/*.jpg, or of CLASS/*.jpg alone.

    Raises: BadInput if a class has no images, or the two splits have different classes.
    """
    train = folder / "train"
    if not train.is_dir():
        return _open_classes(folder, _folder_names(folder), hold_out=split)
    classes = _folder_names(train)
    if split == "train":
        return _open_classes(train, classes)
    validation = next((folder / name for name in VALIDATION if (folder / name).is_dir()), None)
    if validation is None:
        raise BadInput(f"{folder} has train, but no validation or val folder beside it.")
    if extra := sorted(set(_folder_names(validation)) - set(classes)):
        raise BadInput(f"{validation} has a class {extra[0]!r} that {train} lacks.")
    return _open_classes(validation, classes)


def _open_classes(folder: epath.Path, classes: Sequence[str], hold_out: str = "") -> EncodedImages:
    """The images in the folders of these classes, all or those of one split."""
    names, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).exists():
            continue
        found = sorted(n for n in _list(folder / name) if n.lower().endswith(SUFFIXES))
        remote = in_bucket(folder)  # where looking into every class takes long
        if not any(remote or is_image(Path(folder) / name / n) for n in found):
            raise BadInput(f"{folder / name} holds no images ({' '.join(SUFFIXES)}).")
        names += [f"{name}/{n}" for n in found]
        labels += [label] * len(found)
    if not names:
        flat = any(n.lower().endswith(SUFFIXES) for n in _list(folder))
        what = "images, but no folders" if flat else "no images"
        raise BadInput(f"{folder} holds {what}; expected a folder of images for each class.")
    if hold_out:
        chosen = split_indices(classes, names, np.array(labels), hold_out)
        names, labels = [names[i] for i in chosen], [labels[i] for i in chosen]

    def read(index: int) -> tuple[bytes, int, str]:
        path = epath.Path(folder) / names[index]
        return path.read_bytes(), labels[index], str(path)

    return EncodedImages(len(names), read, readable(classes))


def _folder_names(folder: epath.Path) -> list[str]:
    return sorted(name for name in _list(folder) if (folder / name).is_dir())


def _list(folder: epath.Path) -> list[str]:
    """Names of what lies in a folder, hidden files left out; epath is slow on large ones."""
    names = [path.name for path in folder.iterdir()] if in_bucket(folder) else os.listdir(folder)
    return [name for name in names if not name.startswith(".")]
