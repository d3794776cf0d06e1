"""Resampling between scales as small matrices, exact with respect to the PyTorch release.

Both directions are separable and linear, so a resize is two matrix products, and many resizes are
two stacked ones. jax's own "bicubic-pytorch" gives the same; its "area" has another definition.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from var_jax.schedule import Size, shape_of

Matrix = Callable[[int, int], Float[np.ndarray, "out in"]]  # of a resize along one axis


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


def _resize(x_BhwC: Array, size: Size, matrix: Matrix) -> Array:
    given, wanted = x_BhwC.shape[1:3], shape_of(size)
    if given == wanted:
        return x_BhwC
    rows, columns = map(matrix, given, wanted)
    return jnp.einsum(
        "Hh,BhwC,Ww->BHWC", rows, x_BhwC, columns, precision=jax.lax.Precision.HIGHEST
    )


def upsample(x_BpqC: Float[Array, "B p q C"], size: Size) -> Float[Array, "B h w C"]:
    """Bicubic, to `size`; the identity when already there."""
    return _resize(x_BpqC, size, bicubic_matrix)


def downsample(x_BhwC: Float[Array, "B h w C"], size: Size) -> Float[Array, "B p q C"]:
    """Area average, to `size`; the identity when already there."""
    return _resize(x_BhwC, size, area_matrix)


def resize_all(
    x_KBhwC: Float[Array, "K B h w C"],
    given: Sequence[Size],
    wanted: Sequence[Size],
    matrix: Matrix,
) -> Float[Array, "K B h w C"]:
    """Resizes the upper left corner of stack k from size k to size k, all stacks at once.

    Rows and columns beyond a size are zeros.
    """
    x = x_KBhwC
    for axis, product in enumerate(("KHh,KBhwC->KBHwC", "KWw,KBHwC->KBHWC")):
        length = x_KBhwC.shape[2 + axis]
        sides = ([shape_of(size)[axis] for size in sizes] for sizes in (given, wanted))
        padded = [np.pad(m, [(0, length - n) for n in m.shape]) for m in map(matrix, *sides)]
        x = jnp.einsum(product, np.stack(padded), x, precision=jax.lax.Precision.HIGHEST)
    return x
