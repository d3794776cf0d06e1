"""Random changes to one picture, in NumPy, cheap enough for the threads of the input pipeline."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

from var_jax import BadInput

Item = dict[str, np.ndarray]


def augment(
    image: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    *,
    flip: bool = False,
    shift: int = 0,
    zoom: float = 0.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Mirror half of the time, zoom about the centre, move; what comes into view repeats the edge.

    `shift` is the most pixels either way on each axis, `zoom` the most relative change of size, in
    [0, 1). Leave `flip` off where direction is meaning (letters, arrows, flags).
    """
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    dy = int(rng.integers(-shift, shift, endpoint=True))
    dx = int(rng.integers(-shift, shift, endpoint=True))
    if not zoom:
        return _move(_move(image, dy, axis=0), dx, axis=1)
    scale = 1 + rng.uniform(-zoom, zoom)
    moved = _zoom(_zoom(image.astype(np.float32), scale, dy, axis=0), scale, dx, axis=1)
    return (moved + 0.5).astype(np.uint8)


def augment_items(
    *, flip: bool = False, shift: int = 0, zoom: float = 0.0
) -> Callable[[Item, np.random.Generator], Item]:
    """`augment` with these options, as the function of a whole item that `batches` takes.

    Raises: BadInput if an option is out of range.
    """
    if shift < 0 or not 0 <= zoom < 1:
        raise BadInput(
            f"augmentation has shift={shift} and zoom={zoom}; expected a shift of at least 0 and a"
            " zoom in [0, 1)."
        )
    change = functools.partial(augment, flip=flip, shift=shift, zoom=zoom)
    return lambda item, rng: item | {"image": change(item["image"], rng)}


def _move(image: UInt8[np.ndarray, "H W 3"], shift: int, axis: int) -> UInt8[np.ndarray, "H W 3"]:
    """Move along one axis by whole pixels."""
    if shift == 0:
        return image
    return image.take(np.arange(image.shape[axis]) - shift, axis, mode="clip")


def _zoom(
    image: Float32[np.ndarray, "H W 3"], scale: float, shift: int, axis: int
) -> Float32[np.ndarray, "H W 3"]:
    """Scale about the centre and move, along one axis, with linear interpolation."""
    length = image.shape[axis]
    centre = (length - 1) / 2
    position = (np.arange(length, dtype=np.float32) - centre) / scale + (centre - shift)
    low = np.floor(position)
    weight = (position - low).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
    left = image.take(low.astype(int), axis, mode="clip")
    right = image.take(low.astype(int) + 1, axis, mode="clip")
    return left + (right - left) * weight
