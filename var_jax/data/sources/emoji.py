"""The embedded Noto emoji: 1,906 images on white, in 9 classes."""

import json
from importlib import resources

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.data.sources.base import SPLITS, ArraySource, Item, held_out_tenth
from var_jax.schedule import Size, shape_of

CELL = 64  # side of one image in the sheet, pixels
COLUMNS = 44  # 44² cells hold them all, in a nearly square sheet
# Letters, arrows and flags mean something else when mirrored.
NOT_FLIPPABLE = ("Symbols", "Flags")


class Emoji(ArraySource):
    """The emoji in memory, of `size` pixels, cropped from the longer side: even, at most 64.

    `split` is "train", "validation" (every tenth image of a class) or "all". `names` and
    `subgroups` hold one entry an image.

    Raises: BadInput if `split` or `size` is anything else.
    """

    def __init__(self, split: str, size: Size = 32):
        if split not in (*SPLITS, "all"):
            raise BadInput(f"split is {split!r}; the emoji have {', '.join(SPLITS)}, all.")
        side = max(shape_of(size))
        if side % 2 or not 2 <= side <= CELL:
            raise BadInput(f"image size is {size}; the emoji come in even sizes from 2 to {CELL}.")
        assets = resources.files("var_jax") / "assets"
        index = json.loads((assets / "emoji.json").read_text())
        names, labels = np.array(index["name"]), np.array(index["group"], np.int32)
        held_out = held_out_tenth(index["name"], labels)
        keep = {"train": ~held_out, "validation": held_out}.get(split, slice(None))
        with (assets / "emoji.webp").open("rb") as file:
            images = _cells(Image.open(file), side)[: len(labels)][keep]
        images.setflags(write=False)  # items are views
        super().__init__(images, labels[keep], tuple(index["groups"]), size)
        subgroups = np.array(index["subgroups"])[index["subgroup"]]
        self.names, self.subgroups = tuple(names[keep].tolist()), tuple(subgroups[keep].tolist())

    def train_item(self, index: int, epoch: int, rng: np.random.Generator) -> Item:
        """The image, and whether augmentation may mirror it."""
        flippable = self.class_names[self.labels[index]] not in NOT_FLIPPABLE
        return self[index] | {"flippable": np.array(flippable)}


def _cells(sheet: Image.Image, size: int) -> UInt8[np.ndarray, "cells size size 3"]:
    """The cells of the sheet, row by row, averaged down to `size`."""
    rows = sheet.height // CELL
    # A box filter never reaches over the edge of a cell.
    small = sheet.convert("RGB").resize((COLUMNS * size, rows * size), Image.Resampling.BOX)
    cells = np.asarray(small).reshape(rows, size, COLUMNS, size, 3).swapaxes(1, 2)
    return cells.reshape(-1, size, size, 3)
