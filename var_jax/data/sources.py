"""Random-access sources of labelled pictures. Everything else in `data/` only needs `Source`."""

import dataclasses
import json
from importlib import resources
from typing import Protocol

import numpy as np
from etils import epath
from jaxtyping import Int32, UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.assets.build_emoji import CELL, COLUMNS
from var_jax.data.decoding import Skipped, Unreadable, crop, decode
from var_jax.data.encoded import Encoded, every_tenth, open_encoded, part_of
from var_jax.tools.npz import DAMAGED

SPLITS = ("train", "validation", "all")
MOST_UNREADABLE = 100  # in a row


class Source(Protocol):
    """Items are dicts of NumPy arrays: uint8 `image` (H,W,3) and int32 `label` () for pictures.

    `source[i]` is what evaluation sees. A source may also have `draw(i, epoch, rng)`, what training
    sees in that epoch, with random numbers of the item's own, and `upright`, the labels of pictures
    that must not be mirrored.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Emoji:
    """The embedded Noto emoji: 1,906 pictures on white, 9 classes, held in memory.

    `split` is "train", "validation" (every tenth picture of a class) or "all"; `size` is the side
    in pixels, even and at most 64. `names` and `subgroups` hold one entry a picture; `upright` are
    the labels of pictures whose mirror image means something else: letters, arrows, flags.

    Raises: BadInput if `split` or `size` is anything else.
    """

    def __init__(self, split: str, size: int = 32):
        if split not in SPLITS:
            raise BadInput(f"split is {split!r}; the emoji have {', '.join(SPLITS)}.")
        if size % 2 or not 2 <= size <= CELL:
            raise BadInput(f"image size is {size}; the emoji come in even sizes from 2 to {CELL}.")
        assets = resources.files("var_jax") / "assets"
        index = json.loads((assets / "emoji.json").read_text())
        labels = np.array(index["group"], np.int32)
        held_out = every_tenth(index["name"], labels)
        keep = {"train": ~held_out, "validation": held_out, "all": np.full(len(labels), True)}
        chosen = np.flatnonzero(keep[split])

        self.class_names: tuple[str, ...] = tuple(index["groups"])
        self.upright = frozenset(map(self.class_names.index, ("Symbols", "Flags")))
        self.names: tuple[str, ...] = tuple(index["name"][i] for i in chosen)
        self.subgroups: tuple[str, ...] = tuple(
            index["subgroups"][index["subgroup"][i]] for i in chosen
        )
        self.labels = labels[chosen]
        with (assets / "emoji.webp").open("rb") as file:
            self.images = _cells(Image.open(file), size)[chosen]
        self.images.setflags(write=False)  # items are views

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Squares of side `size` from encoded pictures: random ones for training, else the centre.

    The next readable picture takes the place of one that cannot be read, whichever host or thread
    meets it; a warning names it.
    """

    encoded: Encoded
    size: int
    resize: float
    skipped: Skipped = dataclasses.field(default_factory=Skipped)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.encoded.class_names

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.draw(index)

    def draw(
        self, index: int, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """The picture at a random place, the same whatever the epoch; without `rng` the centre."""
        name = ""
        for i in range(index, index + MOST_UNREADABLE):
            try:
                data, label, name = self.encoded[i % len(self)]
                image = decode(data, round(self.resize * self.size))
            except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
                name = str(error.filename)
                self.skipped.add(name, Unreadable(str(error.strerror)))
            except Unreadable as reason:
                self.skipped.add(name, reason)
            else:
                square = crop(image, self.size, self.resize, rng)
                return {"image": square, "label": np.array(label, np.int32)}
        raise BadInput(f"{MOST_UNREADABLE} pictures in a row cannot be read, the last is {name}.")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Pictures in memory. Those that are not of side `size` are resampled as `Pictures` are."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]
    size: int
    resize: float

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.draw(index)

    def draw(
        self, index: int, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """As it is, or cropped at random; without `rng` the centre."""
        image = self.images[index]
        if image.shape[:2] != (self.size, self.size):
            image = crop(Image.fromarray(image), self.size, self.resize, rng)
        return {"image": image, "label": self.labels[index]}


def open_source(spec: str, split: str, size: int, resize: float = 1.125) -> Source:
    """The source that `spec` names: "emoji", an .npz, a folder or "tfds:NAME" (data/encoded.py).

    Its pictures are squares of side `size`, cut from a shorter edge of `resize` times that.

    Raises: BadInput if there is no such source, split or size.
    """
    if split not in SPLITS[:2]:
        raise BadInput(f"split is {split!r}; expected train or validation.")
    if size < 1 or resize < 1:
        raise BadInput(f"data.size={size} and data.resize={resize} must be at least 1.")
    if spec == "emoji":
        return Emoji(split, size)
    if spec.endswith(".npz"):
        return open_arrays(spec, split, size, resize)
    if not (spec.startswith("tfds:") or "/" in spec or epath.Path(spec).exists()):
        raise BadInput(f"data source is {spec!r}; expected emoji, a folder, X.npz or tfds:NAME.")
    return Pictures(open_encoded(spec, split), size, resize)


def open_arrays(path: str, split: str, size: int, resize: float) -> Arrays:
    """Arrays from an .npz: `arr_0` uint8 (N,H,W,3), `labels` (N,), perhaps `class_names` (C,).

    Every tenth picture of a class is held out.

    Raises: BadInput if the file is no such .npz.
    """
    try:
        with epath.Path(path).expanduser().open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
            names = arrays.get("class_names")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except KeyError as error:
        raise BadInput(f"{path} lacks one of two arrays; expected arr_0 and labels.") from error
    except DAMAGED as error:
        raise BadInput(f"{path} is no npz file, or a damaged one.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise BadInput(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}; expected uint8 (N,H,W,3)."
        )
    whole = np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(images),)
    if not whole or not len(labels):
        raise BadInput(f"{path}: labels is {labels.dtype} of shape {labels.shape}; expected (N,).")
    if labels.min() < 0:
        raise BadInput(f"{path}: labels holds {labels.min()}; expected numbers from 0.")
    count = int(labels.max()) + 1
    class_names = tuple(map(str, range(count) if names is None else np.atleast_1d(names)))
    if len(set(class_names)) < len(class_names):
        raise BadInput(f"{path}: class_names holds one name twice.")
    if count > len(class_names):
        raise BadInput(f"{path} has label {count - 1}, but {len(class_names)} class_names.")
    chosen = part_of(class_names, [str(i) for i in range(len(labels))], labels, split)
    return Arrays(images[chosen], labels[chosen].astype(np.int32), class_names, size, resize)


def _cells(sheet: Image.Image, size: int) -> UInt8[np.ndarray, "cells size size 3"]:
    """The cells of the sheet, row by row, averaged down to `size`."""
    rows = sheet.height // CELL
    # A box filter never reaches over the edge of a cell.
    small = sheet.convert("RGB").resize((COLUMNS * size, rows * size), Image.Resampling.BOX)
    cells = np.asarray(small).reshape(rows, size, COLUMNS, size, 3).swapaxes(1, 2)
    return cells.reshape(-1, size, size, 3)
