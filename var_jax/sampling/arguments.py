"""What users of the library pass to it, checked: one sentence says what does not fit."""

from pathlib import PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from var_jax import BadInput
from var_jax.config import MAX_SEED
from var_jax.data.decoding import Unreadable, decode, upright
from var_jax.tools.paths import user_path

LARGEST = 1024  # side of what any model paints; larger images may be read reduced


def check_seed(seed: Any) -> None:
    """Raises BadInput unless it is a whole number in range."""
    if not is_whole(seed, 0) or seed > MAX_SEED:
        raise BadInput(f"seed={short(seed)}; expected a whole number of 0 to {MAX_SEED}.")


def check_batch_size(batch_size: Any) -> None:
    """Raises BadInput unless it is a whole number of at least 1."""
    if not is_whole(batch_size, 1):
        raise BadInput(f"batch_size={short(batch_size)}; expected a whole number of at least 1.")


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and int(value) >= least


def short(value: Any) -> str:
    """A value for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_array(name: str, value: Any) -> np.ndarray:
    """A NumPy array; of PIL images, RGB.

    Raises: BadInput, naming the argument, for lists of unequal lengths and unreadable images.
    """
    try:
        if isinstance(value, Image.Image):
            return np.asarray(upright(value))
        if isinstance(value, (list, tuple)):
            value = [np.asarray(upright(x)) if isinstance(x, Image.Image) else x for x in value]
        return np.asarray(value)
    except (Unreadable, OSError, ValueError) as error:
        raise BadInput(f"{name} cannot be read as an array ({error}).") from error


def as_image(pixels: Any) -> Image.Image:
    """An array as an image: grey (H, W), RGB (H, W, 3) or RGBA. Raises: BadInput for any other."""
    array = as_array("image", pixels)
    known = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not known or not array.size:
        raise BadInput(f"image is {array.dtype} of shape {array.shape}; expected uint8 (H, W, 3).")
    return Image.fromarray(array)


def to_numbers(name: str, value: Any) -> tuple[float, ...]:
    """One number or a sequence of them. Raises: BadInput for anything else."""
    try:
        array = np.atleast_1d(np.asarray(value))
    except (TypeError, ValueError):
        array = np.zeros((0, 0))
    real = any(jnp.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating))
    if array.ndim != 1 or not array.size or not real or not np.isfinite(array).all():
        raise BadInput(f"{name}={short(value)}; expected numbers.")
    return tuple(map(float, array))


def read_image(path: str | PurePath, name: str = "image", backdrop: str = "white") -> Image.Image:
    """An image file, upright, in RGB, transparency on a backdrop.

    Raises: BadInput, which calls it `name`, if it is none.
    """
    try:
        return decode(user_path(path, name).read_bytes(), LARGEST, backdrop)
    except OSError as error:
        raise BadInput(f"{name}={path} cannot be read: {error.strerror or error}.") from error
    except Unreadable as error:
        raise BadInput(f"{name}={path} cannot be read: {error}.") from error
