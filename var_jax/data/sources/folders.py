"""Trees of image files with one folder for each class, local or in a bucket."""

import errno
import functools
import itertools
import operator
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from var_jax import BadInput
from var_jax.data.decoding import MAX_BYTES, begins_like_image
from var_jax.data.sources.base import EncodedImages, split_indices
from var_jax.data.sources.imagenet import readable
from var_jax.tools.buckets import read_object
from var_jax.tools.files import in_bucket

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"
)  # fmt: skip
VALIDATION = ("validation", "valid", "val")
OPENED = 20_000  # files, up to which each is opened at the start, to see what it is
THREADS = 32  # that do so
NOT_NAMED = "not named like images"
IGNORED = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found"}  # of no one's making


def open_folders(folder: epath.Path, split: str) -> EncodedImages:
    """A tree of train/CLASS/image and validation/CLASS/image, or of CLASS/image alone.

    Classes are numbered in the order of their names as text: 1, 10, 2. Images are what begins like
    one; in buckets and in trees of over 20,000 files, what is named like one.

    Raises: BadInput if a class has no images, or the two splits have different classes.
    """
    train = folder / "train"
    if not train.is_dir() or _is_class(folder, train):
        classes, left_out = _classes(folder)
        return _open_classes(folder, classes, left_out, hold_out=split)
    classes, left_out = _classes(train)
    if split == "train":
        return _open_classes(train, classes, left_out)
    validation = next((folder / name for name in VALIDATION if (folder / name).is_dir()), None)
    if validation is None:
        raise BadInput(f"{folder} has train, but no validation or val folder beside it.")
    found, left_out = _classes(validation)
    if extra := sorted(set(found) - set(classes)):
        raise BadInput(f"{validation} has a class {extra[0]!r} that {train} lacks.")
    return _open_classes(validation, classes, left_out)


def _is_class(folder: epath.Path, train: epath.Path) -> bool:
    """Whether `train` is a class among others, as trains are, and no split."""
    others = {*_classes(folder)[0]} - {"train", "test", *VALIDATION}
    return bool(others) and not _classes(train)[0]


def flat_images(folder: epath.Path) -> tuple[str, ...]:
    """The names of the images in a folder, in order; none where it holds folders.

    Raises: BadInput if a file that is named like an image is none.
    """
    classes, others = _classes(folder)
    if classes:
        return ()
    images, others = _images(folder, by_name=in_bucket(folder) or len(others) > OPENED)
    for name, why in others.items() if images else ():
        if name.lower().endswith(SUFFIXES):
            raise BadInput(f"{folder / name} cannot be read ({why}); mend or remove it.")
    return tuple(name for name, _ in images)


def _open_classes(
    folder: epath.Path, classes: Sequence[str], left_out: Mapping[str, str], hold_out: str = ""
) -> EncodedImages:
    """The images in the folders of these classes, all or those of one split."""
    there = {name: i for i, name in enumerate(classes) if (folder / name).exists()}
    by_name = in_bucket(folder) or sum(len(os.listdir(folder / name)) for name in there) > OPENED
    found, labels, left_out = [], [], dict(left_out)
    for name, label in there.items():
        images, others = _images(folder / name, by_name)
        if not images:
            raise _no_images(folder / name, others)
        found += [(f"{name}/{image}", size) for image, size in images]
        labels += [label] * len(images)
        left_out |= {f"{name}/{other}": why for other, why in others.items()}
    if not found and any(name.removesuffix(".gz").endswith("-ubyte") for name in left_out):
        raise BadInput(f"{folder} holds IDX files; expected idx:{folder}.")
    if not found:
        raise _no_images(folder, {})
    if hold_out:
        keys = [os.fsencode(name) for name, _ in found]
        chosen = split_indices(classes, keys, np.array(labels), hold_out)
        found, labels = [found[i] for i in chosen], [labels[i] for i in chosen]
    names, sizes = zip(*found, strict=True)

    def read(index: int) -> tuple[bytes, int, str]:
        path = epath.Path(folder) / names[index]
        if in_bucket(folder):
            return read_object(path), labels[index], str(path)
        if os.path.getsize(path) > MAX_BYTES:
            raise OSError(errno.EFBIG, f"over {MAX_BYTES / 1e6:.0f} MB", str(path))
        return path.read_bytes(), labels[index], str(path)

    sizes = () if by_name else sizes
    return EncodedImages(len(names), read, readable(classes), names, sizes, left_out)


def _classes(folder: epath.Path) -> tuple[list[str], dict[str, str]]:
    """Names of the folders in a folder, in order, and what else lies there."""
    names = sorted(_list(folder))
    folders = [name for name in names if (folder / name).is_dir()]
    return folders, dict.fromkeys({*names} - {*folders}, "beside the folders of classes")


def _images(folder: epath.Path, by_name: bool) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """(name, size) of the images in a folder, in order, and why others are none.

    With `by_name` files that are named like images are not opened, and sizes are 0.
    """
    if in_bucket(folder):
        names = sorted(_list(folder))
        found = [0 if name.lower().endswith(SUFFIXES) else NOT_NAMED for name in names]
    else:
        with os.scandir(folder) as entries:
            chosen = sorted(
                (entry for entry in entries if _counts(entry.name)), key=operator.attrgetter("name")
            )
        names = [entry.name for entry in chosen]
        look = functools.partial(_look, by_name)
        with ThreadPoolExecutor(THREADS) as pool:  # to open a file on a network takes long
            found = [*(map if by_name else pool.map)(look, chosen)]
    pairs = [*zip(names, found, strict=True)]
    others = {name: why for name, why in pairs if isinstance(why, str)}
    return [(name, size) for name, size in pairs if isinstance(size, int)], others


def _look(by_name: bool, entry: os.DirEntry[str]) -> int | str:
    """The size of an image file (0 by its name alone), or why a local file is none."""
    # The listing often knows of a plain file, of what a link means only a request.
    if not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):
        return "folders" if os.path.isdir(entry.path) else "no files"  # a pipe might never answer
    if by_name and entry.name.lower().endswith(SUFFIXES):
        return 0
    try:
        with open(entry.path, "rb") as file:
            start, size = file.read(32), os.fstat(file.fileno()).st_size
    except PermissionError:
        return "not readable by this user"
    if not begins_like_image(start):
        return "of no known format" if start else "empty"
    return size


def _no_images(folder: epath.Path, others: Mapping[str, str]) -> BadInput:
    """What to say of a folder without images: where the first ones lie, or what lies there."""
    tree = () if in_bucket(folder) else itertools.islice(os.walk(folder), 1000)
    for path, _, names in tree:
        images = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        if not images or (others and path == str(folder)):
            continue
        if path == str(folder):
            wanted = "expected a folder of images for each class"
            return BadInput(f"{folder} holds images, but no folders; {wanted}.")
        root = os.path.dirname(path)
        root = os.path.dirname(root) if os.path.basename(root) in ("train", *VALIDATION) else root
        return BadInput(
            f"{folder} holds no images itself, the first lies at {path}/{min(images)}; expected"
            f" images in a folder for each class, as {root} has them."
        )
    some = "".join(f" ({name!r} is left out: {why})" for name, why in [*others.items()][:1])
    return BadInput(
        f"{folder} holds no images{some}; every folder beside it counts as a class, too."
    )


def _list(folder: epath.Path) -> list[str]:
    """Names of what lies in a folder, hidden files left out; epath is slow on large ones."""
    names = [path.name for path in folder.iterdir()] if in_bucket(folder) else os.listdir(folder)
    return [*filter(_counts, names)]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in IGNORED
