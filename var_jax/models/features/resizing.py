"""How published networks bring images to the size that they see, as small matrices."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from var_jax.models.features.weights import HIGHEST

BITS = 22  # of the fractions that Pillow computes with


@functools.cache
def tensorflow_bilinear(size_in: int, size_out: int) -> Float[np.ndarray, "out in"]:
    """Bilinear as by TensorFlow 1: pixel i lies at i·in/out, without half-pixel centres.

    In float32, as there.
    """
    where = np.arange(size_out, dtype=np.float32) * np.float32(size_in / size_out)
    low = np.minimum(where.astype(int), size_in - 1)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows, part = np.arange(size_out), where - low
    np.add.at(matrix, (rows, low), 1 - part)
    np.add.at(matrix, (rows, np.minimum(low + 1, size_in - 1)), part)
    return matrix


@functools.cache
def pillow_bicubic(size_in: int, size_out: int) -> Int[np.ndarray, "out in"]:
    """Bicubic as by Pillow, in units of 2**-BITS.

    A = -0.5, half-pixel centres, wider where it shrinks (antialiasing).
    """
    ratio = size_in / size_out
    centre = (np.arange(size_out)[:, None] + 0.5) * ratio
    distance = np.abs(np.arange(size_in) - centre + 0.5) / max(ratio, 1)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = -0.5 * (((distance - 5) * distance + 8) * distance - 4)
    weight = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weight *= 2**BITS / weight.sum(1, keepdims=True)
    return np.trunc(weight + np.copysign(0.5, weight)).astype(np.int32)


def resize_tensorflow(image: UInt8[Array, "B H W 3"], size: int) -> Float[Array, "B S S 3"]:
    """Bilinear as by TensorFlow 1, to squares of values in 0..255."""
    _, H, W, _ = image.shape
    x = along_width(tensorflow_bilinear(W, size), image.astype(jnp.float32))
    return along_height(tensorflow_bilinear(H, size), x)


def resize_pillow(image: UInt8[Array, "B H W 3"], size: int) -> Float[Array, "B S S 3"]:
    """Bicubic as by Pillow, bit by bit, to squares of whole values in 0..255."""
    _, H, W, _ = image.shape
    x = fixed_point(along_width, pillow_bicubic(W, size), image.astype(jnp.float32))
    return fixed_point(along_height, pillow_bicubic(H, size), x)


def fixed_point(along: Callable[..., Array], matrix: np.ndarray, x: Array) -> Array:
    """A product rounded to bytes. Two products of half as many bits are exact in float32."""
    high = (matrix + (1 << 10)) >> 11
    exact = lambda part: along(part.astype(np.float32), x).astype(jnp.int32)
    product = (exact(high) << 11) + exact(matrix - (high << 11))
    return ((product + (1 << BITS - 1)) >> BITS).clip(0, 255).astype(jnp.float32)


def along_width(matrix: np.ndarray, x: Array) -> Array:
    return jnp.einsum("Ww,BhwC->BhWC", matrix, x, precision=HIGHEST)


def along_height(matrix: np.ndarray, x: Array) -> Array:
    return jnp.einsum("Hh,BhwC->BHwC", matrix, x, precision=HIGHEST)
