"""Labelled images from the embedded emoji, .npz and IDX files, folders and tensorflow-datasets."""

from var_jax import BadInput
from var_jax.data.records import MANIFEST, UNFINISHED
from var_jax.data.sources.base import SPLITS, ArraySource, EncodedImages, ImageSource, Source
from var_jax.data.sources.emoji import Emoji
from var_jax.data.sources.folders import open_folders
from var_jax.data.sources.idx import open_idx
from var_jax.data.sources.npz import open_npz
from var_jax.data.sources.packed import open_packed
from var_jax.data.sources.tars import TARS, open_tars
from var_jax.data.sources.tfds import open_tfds
from var_jax.schedule import Size, shape_of
from var_jax.tools.files import local_path
from var_jax.tools.npz import is_npz
from var_jax.tools.paths import user_path

__all__ = [
    "SPLITS",
    "ArraySource",
    "Emoji",
    "EncodedImages",
    "ImageSource",
    "Source",
    "open_encoded",
    "open_source",
]


def open_source(spec: str, split: str, size: Size, resize: float = 1.125) -> Source:
    """The source that `spec` names: "emoji", an .npz, a folder, "idx:DIR" or "tfds:NAME".

    Its images are crops of `size`, each of an image resized to just cover `resize` times that.

    Raises: BadInput if there is no such source, split or size.
    """
    if split not in SPLITS:
        raise BadInput(f"split is {split!r}; expected train or validation.")
    if min(shape_of(size)) < 1 or resize < 1:
        raise BadInput(f"data.size={size} and data.resize={resize} must be at least 1.")
    if spec == "emoji":
        check_only_packaged(split)
        return Emoji(split, size)
    if spec.startswith("idx:"):
        return open_idx(spec.removeprefix("idx:"), split, size, resize)
    if is_npz(spec):
        return open_npz(spec, split, size, resize)
    is_path = spec.startswith("~") or "/" in spec or user_path(spec, "data.source").exists()
    if not (is_path or spec.startswith("tfds:")):
        known = "emoji, a folder, X.npz, idx:DIR or tfds:NAME"
        raise BadInput(f"data source is {spec!r}; expected {known}.")
    encoded = open_encoded(spec, split)
    if not len(encoded):
        raise BadInput(f"data source {spec!r} has no {split} images.")
    return ImageSource(encoded, size, resize)


def check_only_packaged(split: str) -> None:
    """Raises BadInput if "emoji" may mean a folder of images here, too."""
    try:
        open_encoded("emoji", split)
    except (BadInput, OSError):  # there is none, or it holds other things, such as a run
        return
    raise BadInput(
        "data source 'emoji' may mean the images of the package or those in the folder emoji here;"
        " say ./emoji for the folder, or rename it for the package."
    )


def open_encoded(spec: str, split: str) -> EncodedImages:
    """The encoded images that `spec` names: "tfds:NAME", or a folder of one of the other formats.

    Without a validation split a tenth of the images (tfds: a twentieth) is held out.

    Raises: BadInput if there is no such set or split, or it is empty.
    """
    if spec.startswith("tfds:"):
        return open_tfds(spec.removeprefix("tfds:"), split)
    folder = user_path(spec, "data.source")
    if not folder.exists():
        raise BadInput(f"data source {spec!r}: there is no such folder.")
    if not folder.is_dir():
        raise BadInput(
            f"data source {spec!r} is a file; expected a folder, or an npz called X.npz."
        )
    if (folder / MANIFEST).exists() or (folder / UNFINISHED).exists():
        return open_packed(folder, split)
    if any((folder / name).exists() for name in TARS.values()):
        return open_tars(local_path(folder, "data.source"), split)
    return open_folders(folder, split)
