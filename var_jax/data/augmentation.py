"""Random augmentation of one image, in NumPy, cheap enough for the threads of the pipeline."""

from collections.abc import Callable

import numpy as np

from var_jax import BadInput
from var_jax.data.sources.base import Item


def augment_items(
    *, flip: bool = False, shift: int = 0
) -> Callable[[Item, np.random.Generator], Item]:
    """The function of an item that `batches` takes to augment its `image`.

    It mirrors half of the time (never where `flippable` is false; the key is removed) and
    translates by up to `shift` pixels either way on each axis; the edge is repeated.

    Raises: BadInput if `shift` is negative.
    """
    if shift < 0:
        raise BadInput(f"augmentation has shift={shift}; expected at least 0.")

    def augment(item: Item, rng: np.random.Generator) -> Item:
        item = dict(item)
        image, flippable = item["image"], item.pop("flippable", True)
        if flip and flippable and rng.random() < 0.5:
            image = image[:, ::-1]
        for axis in (0, 1):
            if move := rng.integers(-shift, shift, endpoint=True):
                image = image.take(np.arange(image.shape[axis]) - move, axis, mode="clip")
        return item | {"image": image}

    return augment
