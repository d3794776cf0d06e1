"""Discriminators: networks that tell images from reconstructions. Single-device code."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from var_jax.config import GanConfig
from var_jax.models import backend
from var_jax.models.features.dino import GROUPS_S16, SIZE, WIDTH_S16, DinoV2, dino_s16
from var_jax.models.resize import upsample
from var_jax.models.tokenizer import conv, group_norm
from var_jax.schedule import Size, shape_of

MAX_WIDTH = 8  # of PatchGAN's convolutions, in `channels`
FIRST_ITERATIONS = 15  # of the power method where a network begins, as torch's
SHIFT, CUTOUT = 1 / 8, 0.2  # of DiffAug, in sides of the image


class PatchGan(nnx.Module):
    """A CNN with a logit for each of overlapping patches, of 70 pixels where `layers` is 3.

    Isola et al., arXiv 1611.07004, §3.2; with GroupNorm, so that the logits of an image depend on
    no other.
    """

    def __init__(self, config: GanConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * min(2**i, MAX_WIDTH) for i in range(config.layers + 1)]
        strides = [2] * config.layers + [1]
        pairs = zip([3, *widths[:-1]], widths, strides, strict=True)
        pad = {"padding": ((1, 1), (1, 1))}
        self.convs = nnx.List([conv(a, b, 4, rngs, strides=s, **pad) for a, b, s in pairs])
        # 32 groups, or fewer: a group of one channel would leave its bias without effect.
        groups = [max(math.gcd(width, 128) // 4, 1) for width in widths[1:]]
        pairs = zip(widths[1:], groups, strict=True)
        self.norms = nnx.List([group_norm(width, count) for width, count in pairs])
        self.conv_out = conv(widths[-1], 1, 4, rngs, **pad)

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        keys: Key[Array, " B"],
        frozen: None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B N"]:
        """Logits of the patches of images in [-1, 1]; `dtype` is of activations."""
        x = image.astype(dtype)
        for i, convolve in enumerate(self.convs):
            x = convolve(x)
            x = jax.nn.leaky_relu(self.norms[i - 1](x) if i else x, 0.2)
        return self.conv_out(x).astype(jnp.float32).reshape(len(image), -1)


class SpectralConv(nnx.Module):
    """A convolution along patches whose largest singular value is 1, about.

    Miyato et al., arXiv 1802.05957. `u` follows the left singular vector by `power_iteration`.
    """

    def __init__(self, c_in: int, c_out: int, size: int, *, rngs: nnx.Rngs):
        bound = (c_in * size) ** -0.5
        draw = lambda *shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.kernel, self.bias = nnx.Param(draw(size, c_in, c_out)), nnx.Param(draw(c_out))
        u = unit(jax.random.normal(rngs.params(), (c_out,)))
        self.u = nnx.Param(jax.lax.fori_loop(0, FIRST_ITERATIONS, lambda _, u: self.follow(u), u))

    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B P F"]:
        u, around = jax.lax.stop_gradient(self.u[...]), self.kernel.shape[0] // 2
        v = jax.lax.stop_gradient(unit(self.matrix @ u))
        kernel = (self.kernel[...] / (v @ self.matrix @ u)).astype(x.dtype)
        x = jnp.pad(x, ((0, 0), (around, around), (0, 0)), mode="wrap")
        layout = ("NHWC", "HWIO", "NHWC")  # of images one pixel high
        x = backend.convolve(x[:, None], kernel[None], (1, 1), "VALID", dimension_numbers=layout)
        return x[:, 0] + self.bias[...].astype(x.dtype)[None, None]

    def follow(self, u: Float[Array, " F"]) -> Float[Array, " F"]:
        """A step of power iteration."""
        return unit(unit(self.matrix @ u) @ self.matrix)

    @property
    def matrix(self) -> Float[Array, "kC F"]:
        return self.kernel[...].reshape(-1, self.kernel.shape[-1])


class Head(nnx.Module):
    """A residual CNN along the patches of one depth."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv_in = SpectralConv(width, width, 1, rngs=rngs)
        self.conv = SpectralConv(width, width, 9, rngs=rngs)
        self.conv_out = SpectralConv(width, 1, 1, rngs=rngs)
        self.norms = nnx.List([group_norm(width, 32) for _ in range(2)])

    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B P"]:
        x = self.activate(0, self.conv_in(x))
        x = (x + self.activate(1, self.conv(x))) * 2**-0.5
        return self.conv_out(x)[..., 0].astype(jnp.float32)

    def activate(self, i: int, x: Float[Array, "B P C"]) -> Float[Array, "B P C"]:
        """Normalization and nonlinearity."""
        return jax.nn.leaky_relu(self.norms[i](x[:, :, None])[:, :, 0], 0.2)


class DinoHeads(nnx.Module):
    """Heads on the features of DINO ViT-S/16, which stays as it is, at five depths.

    After Sauer et al., "StyleGAN-T", arXiv 2301.09515, §3.2.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.heads = nnx.List([Head(WIDTH_S16, rngs=rngs) for _ in range(GROUPS_S16 + 1)])

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        keys: Key[Array, " B"],
        frozen: DinoV2,
        dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B N"]:
        """Logits of the patches of images in [-1, 1], at each depth; `dtype` is of activations.

        Of images larger than DINO takes it sees a random crop, smaller ones it sees enlarged.
        """
        h, w = image.shape[1:3]
        if (short := min(h, w)) < SIZE:
            image = upsample(image, (h * SIZE // short, w * SIZE // short))
        if image.shape[1:3] != (SIZE, SIZE):
            image = jax.vmap(random_crop)(image, keys)
        features = dino_s16(frozen, image, dtype)
        return jnp.concatenate([head(x) for head, x in zip(self.heads, features, strict=True)], 1)


def make_discriminator(config: GanConfig, *, rngs: nnx.Rngs) -> PatchGan | DinoHeads:
    """The discriminator of a config."""
    return DinoHeads(rngs=rngs) if config.discriminator == "dino" else PatchGan(config, rngs=rngs)


def power_iteration(discriminator: Any) -> Any:
    """The discriminator with a step of power iteration in each `SpectralConv`."""

    def step(module):
        if isinstance(module, SpectralConv):
            module = jax.tree.map(lambda leaf: leaf, module)  # a copy
            module.u = nnx.Param(module.follow(module.u[...]))
        return module

    return jax.tree.map(step, discriminator, is_leaf=lambda x: isinstance(x, SpectralConv))


def unit(x: Float[Array, " C"]) -> Float[Array, " C"]:
    """The vector at length 1."""
    return x / (jnp.linalg.norm(x) + 1e-12)


def random_crop(image: Float[Array, "H W 3"], key: Key[Array, ""]) -> Float[Array, "224 224 3"]:
    """A random square of the size DINO takes."""
    y, x = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2]) - SIZE + 1)
    return select(image, y, x, SIZE)


def augment(image: Float[Array, "H W 3"], key: Key[Array, ""]) -> Float[Array, "H W 3"]:
    """DiffAug: random brightness, saturation, contrast, shift and cut-out square; differentiable.

    Zhao et al., arXiv 2006.10738.
    """
    of_colour, of_shift, of_square = jax.random.split(key, 3)
    brightness, saturation, contrast = jax.random.uniform(of_colour, (3,))
    h, w, _ = image.shape
    sides = np.array((h, w))
    image = image + (brightness - 0.5)
    grey = image.mean(axis=-1, keepdims=True)
    image = (image - grey) * (2 * saturation) + grey
    mean = image.mean()
    image = (image - mean) * (contrast + 0.5) + mean
    most = np.rint(sides * SHIFT).astype(int)
    y, x = jax.random.randint(of_shift, (2,), -most, most + 1)
    image = select(image, y, x, (h, w))
    size = np.rint(sides * CUTOUT).astype(int)
    start = jax.random.randint(of_square, (2,), 0, sides) - size // 2
    offsets = (jnp.arange(side) - first for side, first in zip(sides, start, strict=True))
    rows, columns = ((i >= 0) & (i < length) for i, length in zip(offsets, size, strict=True))
    return jnp.where(rows[:, None, None] & columns[None, :, None], 0.0, image)


def select(image: Float[Array, "H W 3"], y: Array, x: Array, size: Size) -> Float[Array, "h w 3"]:
    """The part at (y, x), zeros where it leaves the image; as products, which suit TPUs."""
    rows, columns = (
        (jnp.arange(wanted)[:, None] + start == jnp.arange(length)[None]).astype(image.dtype)
        for start, wanted, length in zip((y, x), shape_of(size), image.shape[:2], strict=True)
    )
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("Hh,hwC,Ww->HWC", rows, image, columns, precision=exact)
