"""Random-access sources of labelled pictures. Everything else in `data/` only needs `Source`."""

import json
import zlib
from importlib import resources
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.data.build_emoji import CELL, COLUMNS

SPLITS = ("train", "validation", "all")


class Source(Protocol):
    """Items are dicts of NumPy arrays: uint8 `image` (H,W,3) and int32 `label` () for pictures."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Emoji:
    """The embedded Noto emoji: 1,906 pictures on white, 9 classes, held in memory.

    `split` is "train", "validation" (every tenth picture of a class) or "all"; `size` is the side
    in pixels, even and at most 64. `names` and `subgroups` hold one entry a picture.

    Raises: BadInput if `split` or `size` is anything else.
    """

    def __init__(self, split: str, size: int = 32):
        if split not in SPLITS:
            raise BadInput(f"split is {split!r}; the emoji have {', '.join(SPLITS)}.")
        if size % 2 or not 2 <= size <= CELL:
            raise BadInput(f"image size is {size}; the emoji come in even sizes from 2 to {CELL}.")
        assets = resources.files("var_jax") / "data" / "assets"
        index = json.loads((assets / "emoji.json").read_text())
        labels = np.array(index["group"], np.int32)
        held_out = _every_tenth(index["name"], labels)
        keep = {"train": ~held_out, "validation": held_out, "all": np.full(len(labels), True)}
        chosen = np.flatnonzero(keep[split])

        self.class_names: tuple[str, ...] = tuple(index["groups"])
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


def open_source(spec: str, split: str, size: int) -> Source:
    """The source that `spec` names; `split` and `size` as it offers them.

    Raises: BadInput if there is no such source, split or size.
    """
    known = {"emoji": Emoji}
    if spec not in known:
        raise BadInput(f"data source is {spec!r}; expected one of: {', '.join(known)}.")
    return known[spec](split, size)


def _every_tenth(names: list[str], labels: np.ndarray) -> Bool[np.ndarray, " n"]:
    """True for every tenth picture of each class, in the order of a hash of the names.

    A hash instead of a generator: the split must never change with a version of NumPy.
    """
    order = sorted(range(len(names)), key=lambda i: (labels[i], zlib.crc32(names[i].encode())))
    rank = np.arange(len(names)) - np.searchsorted(labels[order], labels[order])
    held_out = np.zeros(len(names), bool)
    held_out[order] = rank % 10 == 0
    return held_out


def _cells(sheet: Image.Image, size: int) -> UInt8[np.ndarray, "cells size size 3"]:
    """The cells of the sheet, row by row, averaged down to `size`."""
    rows = sheet.height // CELL
    # A box filter never reaches over the edge of a cell.
    small = sheet.convert("RGB").resize((COLUMNS * size, rows * size), Image.Resampling.BOX)
    cells = np.asarray(small).reshape(rows, size, COLUMNS, size, 3).swapaxes(1, 2)
    return cells.reshape(-1, size, size, 3)
