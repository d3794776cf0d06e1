"""What is shaped for CPUs alone; each saves at least a tenth of a command's time there.

- Unrolled layers: a training step of configs/emoji.py takes an eighth less time.
- Winograd's F(2×2, 3×3) (Lavin and Gray, arXiv 1509.09308, §4.1) for 3×3 convolutions of wide
  images, 16 products for four pixels instead of 36: encoding at 256 px takes a third less time.
  Tiles of 4×4 pixels, every two pixels, and kernels are transformed by additions, multiplied
  channel by channel, and transformed back to 2×2 pixels. A few rows at a time, so that the tiles
  stay in the processor's cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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


@jax.custom_vjp
def winograd(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B H W F"]:
    """A 3×3 convolution of an image padded by zeros; H in units of `ROWS`, W even."""
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


def plain(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]) -> Float[Array, "B H W F"]:
    """The same by XLA."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


winograd.defvjp(
    lambda x, kernel: (winograd(x, kernel), (x, kernel)),
    lambda kept, gradient: jax.vjp(plain, *kept)[1](gradient),
)


def transform(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    """Four neighbours of the image as four terms of the products."""
    return a - c, b + c, c - b, b - d


def transform_back(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """Four products as two neighbours of the result."""
    return a + b + c, b - c - d
