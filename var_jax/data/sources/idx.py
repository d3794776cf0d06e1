"""The four IDX files of MNIST and of the sets that are made like it."""

import gzip
import math
import os
import re
import string
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int32, UInt8

from var_jax import BadInput
from var_jax.data.sources.base import ArraySource
from var_jax.schedule import Size
from var_jax.tools.files import in_bucket
from var_jax.tools.paths import user_path

FILES = {"train": "train", "validation": "(t10k|test)"}
PADDED = 32  # from 28: a power of two
MAX_BYTES = 2**32  # of a file, uncompressed; EMNIST's largest takes half a gigabyte
# By the first labels of the training set: the files of all sets are named alike.
NAMES: dict[tuple[int, ...], tuple[str, ...]] = {
    (9, 0, 0, 3, 0, 2, 7, 2, 5, 5): (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    ),
}  # fmt: skip
# In Latin letters: the font of plots has no hiragana.
KMNIST = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
# The characters of EMNIST's classes, by a word of the file names: "letters" is of both cases, and
# "balanced" and "bymerge" tell only some small letters from capitals.
CHARACTERS = string.digits + string.ascii_uppercase
EMNIST = {
    "letters": " " + string.ascii_uppercase,  # numbered from 1
    "byclass": CHARACTERS + string.ascii_lowercase,
    "balanced": CHARACTERS + "abdefghnqrt",
    "bymerge": CHARACTERS + "abdefghnqrt",
}


def open_idx(directory: str, split: str, size: Size, resize: float) -> ArraySource:
    """One split of MNIST, Fashion-MNIST, KMNIST or EMNIST in `directory`, compressed or not.

    28×28 grey images become 32×32 RGB by a black border. Fashion-MNIST's classes have their names,
    EMNIST's their characters, KMNIST's, if the folder is KMNIST or KMNIST/raw, their syllables;
    others are called by their numbers.

    Raises: BadInput if the files are missing, damaged or do not fit each other.
    """
    images, labels, names = read_split(directory, split)
    border = [(max(0, PADDED - n) // 2, max(0, PADDED - n + 1) // 2) for n in images.shape[1:]]
    padded = np.pad(images, ((0, 0), *border))
    rgb = np.broadcast_to(padded[..., None], (*padded.shape, 3))  # takes no memory
    return ArraySource(rgb, labels, names, size, resize)


def read_split(
    directory: str, split: str
) -> tuple[UInt8[np.ndarray, "N H W"], Int32[np.ndarray, " N"], tuple[str, ...]]:
    """The upright grey images of a split, their classes, and the names of these.

    Raises: BadInput if the files are missing, damaged or do not fit each other.
    """
    folder = user_path(directory, "data.source")
    train = read_idx(label_file := find_file(folder, "train", "labels"))
    if train.ndim != 1:
        raise BadInput(f"{label_file} is of shape {train.shape}; expected labels (N,).")
    names = class_names(train, label_file)
    images = read_idx(image_file := find_file(folder, split, "images"))
    labels = read_idx(find_file(folder, split, "labels"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
        raise BadInput(
            f"{folder}: {split} images are of shape {images.shape}, labels of {labels.shape};"
            " expected (N,H,W) and (N,)."
        )
    if unknown := sorted({*map(int, labels)} - {*names}):
        raise BadInput(f"{folder}: {split} has label {unknown[0]}, of which no training image is.")
    if "emnist" in image_file.name:
        images = images.transpose(0, 2, 1)  # stored by column
    return images, np.searchsorted([*names], labels).astype(np.int32), tuple(names.values())


def class_names(labels: UInt8[np.ndarray, " N"], file: epath.Path) -> dict[int, str]:
    """The name of each label that occurs."""
    folder = os.path.abspath(file).lower().rsplit("/", 1)[0].removesuffix("/raw")  # torchvision's
    of_kmnist = file.name.startswith("kmnist") or folder.endswith("/kmnist")
    known: Sequence[str] | None = NAMES.get(tuple(map(int, labels[:10])))
    known = known or (KMNIST if of_kmnist else None)
    for word in EMNIST:
        known = EMNIST[word] if f"emnist-{word}-" in file.name else known
    names = known if known and labels.max() < len(known) else [*map(str, range(256))]
    return {int(i): names[i] for i in np.unique(labels)}


def find_file(folder: epath.Path, split: str, kind: str) -> epath.Path:
    """The file of a split's images or labels. Raises: BadInput unless there is exactly one."""
    name = re.compile(rf"(.*[-_])?{FILES[split]}-{kind}[-.]idx[13]-ubyte(\.gz)?")
    there = folder.iterdir() if folder.is_dir() else ()
    is_file = lambda path: in_bucket(path) or os.path.isfile(path)  # no pipe, which epath's allows
    found = sorted(path for path in there if name.fullmatch(path.name) and is_file(path))
    if not found:
        raise BadInput(f"idx:{folder} has no {split} {kind}; expected *-{kind}-idx*-ubyte[.gz].")
    several = ", ".join(path.name for path in found)
    if len({path.name.removesuffix(".gz") for path in found}) > 1:
        raise BadInput(f"idx:{folder} holds several sets ({several}); give each its own folder.")
    if len(found) > 1 and not np.array_equal(read_idx(found[0]), read_idx(found[1])):
        raise BadInput(f"idx:{folder} holds {several}, which differ; remove one.")
    return found[0]


def read_idx(path: epath.Path) -> UInt8[np.ndarray, "..."]:
    """The array of bytes in an IDX file. Raises: BadInput if it is not one, or cut short."""
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            zeros, kind, axes = struct.unpack(">HBB", file.read(4))
            if zeros or kind != 8 or axes not in (1, 3):
                raise BadInput(f"{path} is not an IDX file of bytes.")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            if (size := math.prod(shape)) > MAX_BYTES:
                raise BadInput(f"{path} claims {size} bytes; expected at most {MAX_BYTES}.")
            data = file.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {error}.") from error
    if len(data) != size:
        raise BadInput(f"{path} holds {len(data)} bytes or more; its header says {shape}.")
    return np.frombuffer(data, np.uint8).reshape(shape)
