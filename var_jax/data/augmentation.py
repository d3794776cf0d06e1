"""Random changes to one picture, in NumPy, cheap enough for the threads of the input pipeline."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from var_jax import BadInput
from var_jax.data.sources import Source

Item = dict[str, np.ndarray]


def augment(
    image: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    *,
    flip: bool = False,
    shift: int = 0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Mirror half of the time, move; what comes into view repeats the edge.

    `shift` is the most pixels either way on each axis.
    """
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    dy = int(rng.integers(-shift, shift, endpoint=True))
    dx = int(rng.integers(-shift, shift, endpoint=True))
    return _move(_move(image, dy, axis=0), dx, axis=1)


def augment_items(
    source: Source, *, flip: bool = False, shift: int = 0
) -> Callable[[Item, np.random.Generator], Item]:
    """`augment` with these options, as the function of a whole item that `batches` takes.

    Classes that `source` names in `upright` (the emoji's symbols and flags) are never mirrored.

    Raises: BadInput if `shift` is negative.
    """
    if shift < 0:
        raise BadInput(f"augmentation has shift={shift}; expected at least 0.")
    upright = getattr(source, "upright", ())

    def change(item: Item, rng: np.random.Generator) -> Item:
        may_flip = flip and int(item["label"]) not in upright
        return item | {"image": augment(item["image"], rng, flip=may_flip, shift=shift)}

    return change


def _move(image: UInt8[np.ndarray, "H W 3"], shift: int, axis: int) -> UInt8[np.ndarray, "H W 3"]:
    """Move along one axis by whole pixels."""
    if shift == 0:
        return image
    return image.take(np.arange(image.shape[axis]) - shift, axis, mode="clip")
