"""The image tokenizer: a convolutional encoder and decoder around the residual quantizer.

The CNN is that of VQGAN f16 (VAR §3.1, appendix): residual blocks by level, attention at the lowest
resolution, halving between levels. Images are NHWC in [-1, 1], float32 throughout: products are
three bfloat16 passes on TPU (`HIGH`), one alone changes which code is nearest.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt8

from var_jax.config import TokenizerConfig
from var_jax.models.quantizer import Quantized, Quantizer
from var_jax.models.winograd import convolve
from var_jax.sharding.ops import reshape

HIGH = jax.lax.Precision.HIGH


def conv(c_in: int, c_out: int, size: int, rngs: nnx.Rngs, **kwargs) -> nnx.Conv:
    """A square convolution with torch's default initialisation, as the release trains from."""
    bound = (c_in * size * size) ** -0.5
    draw = lambda key, shape, dtype, **_: jax.random.uniform(key, shape, dtype, -bound, bound)
    return nnx.Conv(
        c_in, c_out, (size, size), rngs=rngs, kernel_init=draw, bias_init=draw, precision=HIGH,
        conv_general_dilated=convolve, **kwargs,
    )  # fmt: skip


class GroupNorm(nnx.Module):
    """Normalizes groups of channels over the whole image; variance about the mean, in float32.

    Reduces pixels ahead of channels: on CPU that is four times as fast as flax's, whose other
    formula for the variance, E[x²] - E[x]², cancels.
    """

    def __init__(self, channels: int, groups: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = self.group_mean(x)
        variance = self.group_mean((x - mean) ** 2)
        return (x - mean) * (jax.lax.rsqrt(variance + 1e-6) * self.scale[...]) + self.bias[...]

    def group_mean(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        """The mean of each group, repeated for each of its channels."""
        B, C, G = x.shape[0], x.shape[-1], self.groups
        mean = reshape(x.mean((1, 2)), B, G, C // G).mean(-1, keepdims=True)
        return reshape(mean.repeat(C // G, axis=-1), B, 1, 1, C)


class ResBlock(nnx.Module):
    """norm → silu → conv, twice, beside a shortcut that is 1×1 where the width changes."""

    def __init__(self, c_in: int, c_out: int, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.norm1, self.conv1 = GroupNorm(c_in, config.norm_groups), conv(c_in, c_out, 3, rngs)
        self.norm2, self.conv2 = GroupNorm(c_out, config.norm_groups), conv(c_out, c_out, 3, rngs)
        self.shortcut = conv(c_in, c_out, 1, rngs) if c_in != c_out else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """One head of self-attention over the pixels of the lowest resolution."""

    def __init__(self, channels: int, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config.norm_groups)
        self.qkv, self.proj = (
            conv(channels, 3 * channels, 1, rngs),
            conv(channels, channels, 1, rngs),
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(B, H * W, 3 * C), 3, axis=-1)
        score = jnp.einsum("BLC,BSC->BLS", q * C**-0.5, k, precision=HIGH)
        mean = jnp.einsum("BLS,BSC->BLC", jax.nn.softmax(score, axis=-1), v, precision=HIGH)
        return x + self.proj(mean.reshape(B, H, W, C))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest one."""

    def __init__(self, widths: list[int], attend: bool, config: TokenizerConfig, *, rngs: nnx.Rngs):
        pairs = list(itertools.pairwise(widths))
        self.blocks = nnx.List([ResBlock(a, b, config, rngs=rngs) for a, b in pairs])
        self.attentions = nnx.List(
            [Attention(b, config, rngs=rngs) for _, b in pairs] if attend else []
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x


class Middle(nnx.Module):
    """block → attention → block at the lowest resolution."""

    def __init__(self, channels: int, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.block1 = ResBlock(channels, channels, config, rngs=rngs)
        self.attention = Attention(channels, config, rngs=rngs)
        self.block2 = ResBlock(channels, channels, config, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nnx.Module):
    """Image → latent, `downsample` times smaller."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * m for m in (1, *config.channel_mults)]
        last = len(config.channel_mults) - 1
        self.config = config
        self.conv_in = conv(3 * config.patch_size**2, config.channels, 3, rngs)
        self.levels = nnx.List([
            Level([a] + [b] * config.num_res_blocks, i == last, config, rngs=rngs)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        ])  # fmt: skip
        # torch pads this one at the right and bottom only.
        self.halve = nnx.List([
            conv(w, w, 3, rngs, strides=2, padding=((0, 1), (0, 1))) for w in widths[1:-1]
        ])  # fmt: skip
        self.middle = Middle(widths[-1], config, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], config.norm_groups)
        self.conv_out = conv(widths[-1], config.latent_dim, 3, rngs)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = self.conv_in(space_to_depth(image, self.config.patch_size))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.halve):
                x = self.halve[i](x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latent → image, the encoder's mirror with one block more a level."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.channel_mults]
        below = [*widths, widths[-1]]  # what level i receives from level i+1
        last = len(widths) - 1
        self.config = config
        self.conv_in = conv(config.latent_dim, widths[-1], 3, rngs)
        self.middle = Middle(widths[-1], config, rngs=rngs)
        self.levels = nnx.List([
            Level([below[i + 1]] + [widths[i]] * (config.num_res_blocks + 1), i == last, config,
                  rngs=rngs)
            for i in range(last + 1)
        ])  # fmt: skip
        self.double = nnx.List([conv(w, w, 3, rngs) for w in widths[1:]])
        self.norm_out = GroupNorm(widths[0], config.norm_groups)
        self.conv_out = conv(widths[0], 3 * config.patch_size**2, 3, rngs)

    def __call__(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = self.middle(self.conv_in(latent))
        for i in reversed(range(len(self.levels))):
            x = self.levels[i](x)
            if i > 0:
                x = self.double[i - 1](x.repeat(2, axis=1).repeat(2, axis=2))
        x = self.conv_out(jax.nn.silu(self.norm_out(x)))
        return depth_to_space(x, self.config.patch_size)


class Tokenizer(nnx.Module):
    """Image ↔ codes of every scale. An immutable pytree: use it under plain `jax.jit`."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder, self.decoder = Encoder(config, rngs=rngs), Decoder(config, rngs=rngs)
        self.quantizer = Quantizer(config, rngs=rngs)
        self.pre_conv = conv(config.latent_dim, config.latent_dim, 3, rngs)
        self.post_conv = conv(config.latent_dim, config.latent_dim, 3, rngs)
        if config.skip:
            self.start_as_patch_codec(rngs)

    def start_as_patch_codec(self, rngs: nnx.Rngs) -> None:
        """Adds the linear path, an orthogonal map of patches, and silences all else at the start.

        Training then begins at the quality of plain vector quantization of patches, and the CNN
        learns only what context adds.
        """
        patch, C = 3 * self.config.downsample**2, self.config.latent_dim
        analysis = jax.nn.initializers.orthogonal()(rngs.params(), (patch, C))
        self.analysis, self.synthesis = nnx.Param(analysis), nnx.Param(analysis.T)
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            last.kernel, last.bias = jax.tree.map(jnp.zeros_like, (last.kernel, last.bias))
        self.pre_conv.bias = jax.tree.map(jnp.zeros_like, self.pre_conv.bias)
        identity = jnp.zeros((3, 3, C, C)).at[1, 1].set(jnp.eye(C))
        kernel, bias = self.quantizer.phi_kernel, self.quantizer.phi_bias
        self.quantizer.phi_kernel = nnx.Param(jnp.broadcast_to(identity, kernel.shape))
        self.quantizer.phi_bias = nnx.Param(jnp.zeros(bias.shape))

    def latent(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """The latent that the quantizer explains."""
        latent = self.pre_conv(self.encoder(image))
        if self.config.skip:
            patches = space_to_depth(image, self.config.downsample)
            latent += jnp.matmul(patches, self.analysis[...], precision=HIGH)
        return latent

    def reconstruct(self, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Quantized latent → image, not clipped."""
        image = self.decoder(self.post_conv(f_hat))
        if self.config.skip:
            patches = jnp.matmul(f_hat, self.synthesis[...], precision=HIGH)
            image += depth_to_space(patches, self.config.downsample)
        return image

    def encode(self, image: Float[Array, "B H W 3"]) -> Int32[Array, "B L"]:
        """Image in [-1, 1] → codes 0..V-1, coarse scale first."""
        return self.quantizer.encode(self.latent(image)).idx

    def decode_latent(self, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Quantized latent → image, clipped to [-1, 1]."""
        return self.reconstruct(f_hat).clip(-1, 1)

    def decode(self, idx_BL: Int32[Array, "B L"]) -> Float[Array, "B H W 3"]:
        """Codes → image in [-1, 1]."""
        return self.decode_latent(self.quantizer.decode(idx_BL)[-1])

    def __call__(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], Quantized]:
        """Reconstruction (not clipped), straight-through; and the quantizer's part."""
        quantized = self.quantizer(self.latent(image))
        return self.reconstruct(quantized.f_hat), quantized


def space_to_depth(x: Float[Array, "B H W C"], p: int) -> Float[Array, "B h w ppC"]:
    """Folds each p × p patch into channels."""
    B, H, W, C = x.shape
    x = reshape(x, B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
    return reshape(x, B, H // p, W // p, p * p * C)


def depth_to_space(x: Float[Array, "B h w ppC"], p: int) -> Float[Array, "B H W C"]:
    """The inverse of `space_to_depth`."""
    B, h, w, D = x.shape
    x = reshape(x, B, h, w, p, p, D // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return reshape(x, B, h * p, w * p, D // (p * p))


def to_float(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Bytes → [-1, 1], as a tokenizer takes them."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_bytes(image: Float[Array, "B H W 3"] | np.ndarray) -> UInt8[np.ndarray, "B H W 3"]:
    """[-1, 1] → 0..255, rounded."""
    return np.clip(np.rint((np.asarray(image) + 1) * 127.5), 0, 255).astype(np.uint8)
