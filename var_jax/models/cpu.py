"""What is shaped for CPUs alone; each saves at least a tenth of a command's time there.

- Unrolled layers: a training step of configs/emoji.py takes an eighth less time.
- Winograd's F(2×2, 3×3) (Lavin and Gray, arXiv 1509.09308, §4.1) for 3×3 convolutions of wide
  images, 16 products for four pixels instead of 36: encoding at 256 px takes a third less time.
  Tiles of 4×4 pixels, every two pixels, and kernels are transformed by additions, multiplied
  channel by channel, and transformed back to 2×2 pixels. A few rows at a time, so that the tiles
  stay in the processor's cache.
- Gradients of convolutions, written as convolutions of the layout that XLA has a fast routine for.
  It rewrites those that `jax.grad` gives only outside of loops and branches; inside they take up
  to 25 times as long, and a step whose discriminator starts later (benchmarks/photographs.py) took
  12 times as long. There is no forward-mode differentiation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")
Pairs = tuple[tuple[int, ...], ...]  # of zeros, before and after an image, by axis

MAX_UNROLLED = 8  # layers; each takes memory
ROWS = 16  # of the image at a time
# Below these the additions cost more than the products that they save.
MIN_WIDTH, MIN_CHANNELS = 64, 128
KERNEL_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def unrolls(depth: int, remat: str) -> bool:
    """Of rematerialized layers XLA would drop the second computation, so those are scanned."""
    return remat == "none" and depth <= MAX_UNROLLED


def winograd_pays(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w C F"], strides, padding
) -> bool:
    """Whether `winograd` can stand in for a convolution, and is faster."""
    return (
        x.dtype == jnp.float32
        and (kernel.shape[:2], tuple(strides), padding) == ((3, 3), (1, 1), "SAME")
        and (x.shape[1] % ROWS, x.shape[2] % 2) == (0, 0)
        and x.shape[2] >= MIN_WIDTH
        and min(kernel.shape[2:]) >= MIN_CHANNELS
    )


def winograd(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    """A 3×3 convolution of an image padded by zeros; H in units of `ROWS`, W even."""
    return _winograd(x, kernel_beside(x, kernel))


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C F"],
    strides: tuple[int, int],
    pad: Pairs,
) -> Float[Array, "B _ _ F"]:
    """A convolution by XLA, whose gradients are fast inside loops and branches too.

    Single-device code: on a mesh it belongs inside `data_parallel`.
    """
    return _convolve(x, kernel_beside(x, kernel), strides, pad)


def kernel_beside(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w C F"]
) -> Float[Array, "h w C F"]:
    """The kernel, on each device by itself where the image is, so that gradients are summed."""
    return kernel + jnp.zeros_like(x, shape=())


@jax.custom_vjp
def _winograd(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    B, H, W, C = x.shape
    F, strips = kernel.shape[-1], H // ROWS
    kernel = jnp.einsum("ai,ijCF,bj->abCF", KERNEL_TRANSFORM, kernel, KERNEL_TRANSFORM)
    kernel = kernel.reshape(16, C, F)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def strip(i):
        start = (i // strips, i % strips * ROWS, 0, 0)
        rows = jax.lax.dynamic_slice(x, start, (1, ROWS + 2, W + 2, C))
        pairs = rows.reshape(ROWS // 2 + 1, 2, W // 2 + 1, 2, C)
        tiles = jnp.stack([
            jnp.stack(transform(row[:, :-1, 0], row[:, :-1, 1], row[:, 1:, 0], row[:, 1:, 1]))
            for row in transform(pairs[:-1, 0], pairs[:-1, 1], pairs[1:, 0], pairs[1:, 1])
        ])  # fmt: skip
        # Materialized: fused into the product, the sums would run as slow scalar loops.
        tiles = jax.lax.optimization_barrier(tiles).reshape(16, -1, C)
        product = jax.lax.optimization_barrier(jnp.einsum("kTC,kCF->kTF", tiles, kernel))
        product = product.reshape(4, 4, ROWS // 2, W // 2, F)
        rows = [transform_back(*(product[a, b] for b in range(4))) for a in range(4)]
        columns = [transform_back(*(row[b] for row in rows)) for b in range(2)]
        image = [jnp.stack([column[a] for column in columns], axis=2) for a in range(2)]
        return jnp.stack(image, axis=1).reshape(ROWS, W, F)

    return jax.lax.map(strip, jnp.arange(B * strips)).reshape(B, H, W, F)


_winograd.defvjp(
    lambda x, kernel: (_winograd(x, kernel), (x, kernel)),
    lambda kept, gradient: pull_back((1, 1), ((1, 1), (1, 1)), kept, gradient),
)


def is_plain(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: Any = None,
    precision: Any = None,  # all of which are float32's here
    **options: Any,
) -> bool:
    """Whether `convolve` can stand in for a convolution: float32, NHWC, no dilations or groups."""
    if x.ndim != 4 or {x.dtype, kernel.dtype} != {jnp.dtype("float32")}:
        return False
    layouts = (
        jax.lax.conv_dimension_numbers(x.shape, kernel.shape, given)
        for given in (dimension_numbers, LAYOUT)
    )
    return len({*layouts}) == 1 and all(is_default(value) for value in options.values())


def is_default(value: Any) -> bool:
    """Whether an option of a convolution is left out, in one of the ways to say so."""
    return value is None or value == 1 or (isinstance(value, Sequence) and {*value} == {1})


def pull_back(
    strides: tuple[int, int],
    pad: Pairs,
    kept: tuple[Float[Array, "B H W C"], Float[Array, "h w C F"]],
    gradient: Float[Array, "B _ _ F"],
) -> tuple[Float[Array, "B H W C"], Float[Array, "h w C F"]]:
    """The gradients by image and kernel, from that by the result."""
    x, kernel = kept
    of_image, of_kernel = [], []
    for axis, ((low, _), stride) in enumerate(zip(pad, strides, strict=True)):
        side, size = x.shape[axis + 1], kernel.shape[axis]
        spread = (gradient.shape[axis + 1] - 1) * stride + 1  # of the result, zeros between
        of_image.append((size - 1 - low, side - spread + low))
        of_kernel.append((low, size - 1 + spread - side - low))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    by_image = by_xla(gradient, turned, (1, 1), of_image, lhs_dilation=strides)
    across, down = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)  # sums over images
    by_kernel = by_xla(across, down, (1, 1), of_kernel, rhs_dilation=strides)
    return by_image, by_kernel.transpose(1, 2, 0, 3)


def by_xla(x: Array, kernel: Array, strides, pad, **options) -> Array:
    """`jax.lax.conv_general_dilated` of the layout that is fast."""
    return jax.lax.conv_general_dilated(
        x, kernel, strides, pad, dimension_numbers=LAYOUT, **options
    )


_convolve = jax.custom_vjp(by_xla, nondiff_argnums=(2, 3))
_convolve.defvjp(
    lambda x, kernel, strides, pad: (by_xla(x, kernel, strides, pad), (x, kernel)), pull_back
)


def transform(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    """Four neighbours of the image as four terms of the products."""
    return a - c, b + c, c - b, b - d


def transform_back(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """Four products as two neighbours of the result."""
    return a + b + c, b - c - d
