"""What the formats share: the protocols, crops, and the rule for the held-out tenth."""

import collections
import dataclasses
import errno
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.data.decoding import Skipped, Unreadable, crop, decode
from var_jax.schedule import Size, shape_of
from var_jax.tools.buckets import retrying

SPLITS = ("train", "validation")
MOST_UNREADABLE = 100  # in a row
# What the system says of one image, not of a disk or a network.
OF_ONE_IMAGE = (
    errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.EFBIG
)  # fmt: skip
Item = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Random access to items of `image`, uint8 (H,W,3), or `tokens`, int32 (L,), and `label`."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The item as evaluation sees it."""
        ...

    def train_item(self, index: int, epoch: int, rng: np.random.Generator) -> Item:
        """The item as training sees it in this epoch; `rng` is this item's own."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Random access to `count` image files; `read` gives (bytes, label, name in warnings).

    `names` and `sizes` in bytes are there where they cost nothing to know; `left_out` says of the
    files beside the images why they are none.
    """

    count: int
    read: Callable[[int], tuple[bytes, int, str]]
    class_names: tuple[str, ...]
    names: Sequence[str] = ()
    sizes: Sequence[int] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_names(self.class_names)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[bytes, int, str]:
        """What `read` gives; an error that may pass is tried again."""
        return retrying(lambda: self.read(index))


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Crops of `size` of encoded images: random for training, else the centre.

    An image that cannot be read is replaced by the next readable one, the same on every host and
    thread; a warning names it.
    """

    encoded: EncodedImages
    size: Size
    resize: float
    skipped: Skipped = dataclasses.field(default_factory=Skipped)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.encoded.class_names

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Item:
        return self._item(index, None)

    def train_item(self, index: int, epoch: int, rng: np.random.Generator) -> Item:
        """A random crop, whatever the epoch."""
        return self._item(index, rng)

    def _item(self, index: int, rng: np.random.Generator | None) -> Item:
        name = ""
        for i in range(index, index + MOST_UNREADABLE):
            try:
                data, label, name = self.encoded.load(i % len(self))
                image = decode(data, round(self.resize * max(shape_of(self.size))))
            except OSError as error:
                if error.errno not in OF_ONE_IMAGE and not isinstance(error, FileNotFoundError):
                    raise
                name = str(error.filename or error)
                self.skipped.add(name, Unreadable(error.strerror or "there is none"))
            except Unreadable as reason:
                self.skipped.add(name, reason)
            else:
                part = crop(image, self.size, self.resize, rng)
                return {"image": part, "label": np.array(label, np.int32)}
        raise BadInput(f"{MOST_UNREADABLE} images in a row cannot be read, the last is {name}.")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory. Those that are not of `size` are cropped as by `ImageSource`."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]
    size: Size
    resize: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self._item(index, None)

    def train_item(self, index: int, epoch: int, rng: np.random.Generator) -> Item:
        """The image itself or a random crop, whatever the epoch."""
        return self._item(index, rng)

    def _item(self, index: int, rng: np.random.Generator | None) -> Item:
        image = self.images[index]
        if image.shape[:2] != shape_of(self.size):
            image = crop(Image.fromarray(image), self.size, self.resize, rng)
        return {"image": image, "label": self.labels[index]}


def check_names(names: Sequence[str]) -> None:
    """Raises BadInput if a class has no name that a flag could say, or two have the same."""
    for name, count in collections.Counter(names).items():
        if not name.strip() or not name.isprintable():
            raise BadInput(f"a class is called {name!r}; expected a name that can be read.")
        if count > 1:
            raise BadInput(f"{count} classes are called {name!r}; expected each name once.")


def held_out_tenth(names: Sequence[str], labels: np.ndarray) -> Bool[np.ndarray, " n"]:
    """True for every tenth image of each class, in the order of a hash: the emoji's split.

    A hash instead of a generator: the split must never change with a version of NumPy.
    """
    order = sorted(range(len(names)), key=lambda i: (labels[i], zlib.crc32(names[i].encode())))
    rank = np.arange(len(names)) - np.searchsorted(labels[order], labels[order])
    held_out = np.zeros(len(names), bool)
    held_out[order] = rank % 10 == 0
    return held_out


def split_indices(
    class_names: Sequence[str], keys: Sequence[bytes], labels: np.ndarray, split: str
) -> Int[np.ndarray, " m"]:
    """The images of a split, in a set that has no splits of its own; a tenth is held out.

    The hash of an image's own key decides, so that no image moves when others come or go. Only
    where that leaves a class nothing to train on, or nothing to validate on at all, the largest
    hash of the class stays, or the smallest of all is held out.

    Raises: BadInput if a class has fewer than two images.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    if counts.min() < 2:
        found = f"{class_names[int(counts.argmin())]!r} has {counts.min()} images"
        raise BadInput(f"class {found}; expected at least 2, as a tenth is held out.")
    digests = (hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    hashes = np.array([int.from_bytes(digest) for digest in digests], np.uint64)
    held_out = hashes < 2**64 // 10
    for label in np.flatnonzero(np.bincount(labels, held_out) == counts):
        members = np.flatnonzero(labels == label)
        held_out[members[hashes[members].argmax()]] = False
    if not held_out.any():
        held_out[hashes.argmin()] = True
    return np.flatnonzero(held_out if split == "validation" else ~held_out)
