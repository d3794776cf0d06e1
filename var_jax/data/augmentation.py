"""Random augmentation of one image, in NumPy, cheap enough for the threads of the pipeline."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from var_jax import BadInput
from var_jax.data.sources.base import Item


def augment(
    image: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    *,
    flip: bool = False,
    shift: int = 0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Mirrors half of the time and translates by up to `shift` pixels either way on each axis.

    What comes into view repeats the edge.
    """
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    for axis in (0, 1):
        if move := rng.integers(-shift, shift, endpoint=True):
            image = image.take(np.arange(image.shape[axis]) - move, axis, mode="clip")
    return image


def augment_items(
    *, flip: bool = False, shift: int = 0
) -> Callable[[Item, np.random.Generator], Item]:
    """`augment` with these options, as the function of a whole item that `batches` takes.

    An item whose `flippable` is false is never mirrored; the key is removed.

    Raises: BadInput if `shift` is negative.
    """
    if shift < 0:
        raise BadInput(f"augmentation has shift={shift}; expected at least 0.")

    def change(item: Item, rng: np.random.Generator) -> Item:
        item = dict(item)
        may_flip = flip and bool(item.pop("flippable", True))
        return item | {"image": augment(item["image"], rng, flip=may_flip, shift=shift)}

    return change
