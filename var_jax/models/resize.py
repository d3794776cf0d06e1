"""Resampling between scales as small matrices, exact with respect to the PyTorch release.

Both directions are separable and linear, so a resize is two matrix products, and many resizes are
two stacked ones. jax's own "bicubic-pytorch" gives the same; its "area" has another definition.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def bicubic_matrix(
    size_in: int, size_out: int, ratio: float | None = None
) -> Float[np.ndarray, "out in"]:
    """Bicubic upsampling: A = -0.75, half-pixel centres, clamped borders, no antialiasing.

    `ratio` is the step between pixels, where it is not `size_in / size_out`.
    """
    step = size_in / size_out if ratio is None else ratio
    centre = (np.arange(size_out) + 0.5) * step - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    distance = np.abs(centre[:, None] - taps)
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    weight = np.where(distance <= 1, near, far)
    matrix = np.zeros((size_out, size_in))
    rows = np.arange(size_out)[:, None]
    np.add.at(matrix, (rows, np.clip(taps, 0, size_in - 1).astype(int)), weight)
    return matrix.astype(np.float32)


@functools.cache
def area_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "out in"]:
    """Adaptive average pooling: output i is the mean of inputs floor(i·r) ... ceil((i+1)·r) - 1."""
    matrix = np.zeros((size_out, size_in), np.float32)
    for i in range(size_out):
        start, stop = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def _resize(x_BhwC: Array, matrix: np.ndarray) -> Array:
    return jnp.einsum(
        "Hh,BhwC,Ww->BHWC", matrix, x_BhwC, matrix, precision=jax.lax.Precision.HIGHEST
    )


def upsample(x_BppC: Float[Array, "B p p C"], size: int) -> Float[Array, "B h h C"]:
    """Bicubic, to `size` × `size`; the identity when already there."""
    side = x_BppC.shape[1]
    return x_BppC if side == size else _resize(x_BppC, bicubic_matrix(side, size))


def downsample(x_BhhC: Float[Array, "B h h C"], size: int) -> Float[Array, "B p p C"]:
    """Area average, to `size` × `size`; the identity when already there."""
    side = x_BhhC.shape[1]
    return x_BhhC if side == size else _resize(x_BhhC, area_matrix(side, size))


def resize_all(
    x_KBhhC: Float[Array, "K B h h C"], matrices: Sequence[Float[np.ndarray, "_ _"]]
) -> Float[Array, "K B h h C"]:
    """Resizes stack k by matrix k, all at once; rows and columns beyond its size are zeros."""
    side = x_KBhhC.shape[2]
    square = lambda m: np.pad(m, [(0, side - n) for n in m.shape])
    matrix = np.stack([square(m) for m in matrices])
    x = jnp.einsum("KHh,KBhwC->KBHwC", matrix, x_KBhhC, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("KWw,KBHwC->KBHWC", matrix, x, precision=jax.lax.Precision.HIGHEST)
