"""The image tokenizer: a convolutional encoder and decoder around the residual quantizer.

The CNN is that of VQGAN f16 (VAR §3.2 and §4): residual blocks by level, attention at the lowest
resolution, halving between levels. Images are NHWC in [-1, 1]. Activations are float32, products
three bfloat16 passes on TPU (`HIGH`): one alone changes which code is nearest. Training may ask for
bfloat16 activations; norms, softmax, latents and the quantizer stay float32.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

from var_jax.config import TokenizerConfig
from var_jax.models import backend
from var_jax.models.quantizer import Quantizer
from var_jax.sharding.ops import data_parallel, in_parts

HIGH = jax.lax.Precision.HIGH


def activation_dtype(arrays: tuple, dtype: DTypeLike | None = None) -> tuple:
    """Input, kernel and bias of a convolution, all in the dtype of the input."""
    return tuple(None if x is None else x.astype(arrays[0].dtype) for x in arrays)


def conv(c_in: int, c_out: int, size: int, rngs: nnx.Rngs, **kwargs) -> nnx.Conv:
    """A square convolution with torch's default initialization, as the release trains from."""
    bound = (c_in * size * size) ** -0.5
    draw = lambda key, shape, dtype, **_: jax.random.uniform(key, shape, dtype, -bound, bound)
    return nnx.Conv(
        c_in, c_out, (size, size), rngs=rngs, kernel_init=draw, bias_init=draw, precision=HIGH,
        conv_general_dilated=backend.convolve, promote_dtype=activation_dtype,  # type: ignore
        **kwargs,
    )  # fmt: skip


class GroupNorm(nnx.GroupNorm):
    """Normalizes groups of channels over the whole image, in float32 whatever the input's dtype."""

    def __call__(self, x: Float[Array, "B H W C"], *, mask=None) -> Float[Array, "B H W C"]:
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


def group_norm(channels: int, groups: int) -> GroupNorm:
    """A `GroupNorm` with the variance about the mean."""
    return GroupNorm(channels, groups, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))


class ResBlock(nnx.Module):
    """norm → silu → conv, twice, beside a shortcut that is 1×1 where the width changes."""

    def __init__(self, c_in: int, c_out: int, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.norm1, self.conv1 = group_norm(c_in, config.norm_groups), conv(c_in, c_out, 3, rngs)
        self.norm2, self.conv2 = group_norm(c_out, config.norm_groups), conv(c_out, c_out, 3, rngs)
        self.shortcut = conv(c_in, c_out, 1, rngs) if c_in != c_out else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """One head of self-attention over the pixels of the lowest resolution."""

    def __init__(self, channels: int, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.norm = group_norm(channels, config.norm_groups)
        self.qkv, self.proj = (
            conv(channels, 3 * channels, 1, rngs),
            conv(channels, channels, 1, rngs),
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(B, H * W, 3 * C), 3, axis=-1)
        score = jnp.einsum(
            "BLC,BSC->BLS", q * C**-0.5, k, precision=HIGH, preferred_element_type=jnp.float32
        )
        weight = jax.nn.softmax(score, axis=-1).astype(x.dtype)
        mean = jnp.einsum("BLS,BSC->BLC", weight, v, precision=HIGH)
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
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = conv(widths[-1], config.latent_dim, 3, rngs)

    def __call__(self, image: Float[Array, "B H W c"]) -> Float[Array, "B h w C"]:
        x = self.conv_in(image)
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
        self.conv_in = conv(config.latent_dim, widths[-1], 3, rngs)
        self.middle = Middle(widths[-1], config, rngs=rngs)
        self.levels = nnx.List([
            Level([below[i + 1]] + [widths[i]] * (config.num_res_blocks + 1), i == last, config,
                  rngs=rngs)
            for i in range(last + 1)
        ])  # fmt: skip
        self.double = nnx.List([conv(w, w, 3, rngs) for w in widths[1:]])
        self.norm_out = group_norm(widths[0], config.norm_groups)
        self.conv_out = conv(widths[0], 3 * config.patch_size**2, 3, rngs)

    def __call__(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W c"]:
        x = self.middle(self.conv_in(latent))
        for i in reversed(range(len(self.levels))):
            x = self.levels[i](x)
            if i > 0:
                x = self.double[i - 1](x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Tokenizer(nnx.Module):
    """Image ↔ codes of every scale. An immutable pytree: use it under plain `jax.jit`.

    Single-device code: on a mesh it runs under `sharding.ops.data_parallel`.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder, self.decoder = Encoder(config, rngs=rngs), Decoder(config, rngs=rngs)
        self.quantizer = Quantizer(config, rngs=rngs)
        self.pre_conv = conv(config.latent_dim, config.latent_dim, 3, rngs)
        self.post_conv = conv(config.latent_dim, config.latent_dim, 3, rngs)

    def latent(
        self, image: Float[Array, "B H W 3"], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "B h w C"]:
        """The latent that the quantizer explains, in float32; `dtype` is of the activations."""
        return self.pre_conv(self.encoder(image.astype(dtype)).astype(jnp.float32))

    def reconstruct(
        self, f_hat: Float[Array, "B h w C"], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "B H W 3"]:
        """Quantized latent → image in float32, not clipped; `dtype` is of the activations."""
        return self.decoder(self.post_conv(f_hat).astype(dtype)).astype(jnp.float32)

    def encode(self, image: Float[Array, "B H W 3"]) -> Int32[Array, "B L"]:
        """Image in [-1, 1] → codes 0..V-1, coarse scale first."""
        return self.quantizer.encode(self.latent(image)).idx

    def decode_latent(self, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Quantized latent → image, clipped to [-1, 1]."""
        return self.reconstruct(f_hat).clip(-1, 1)

    def decode(self, idx_BL: Int32[Array, "B L"]) -> Float[Array, "B H W 3"]:
        """Codes → image in [-1, 1]."""
        return self.decode_latent(self.quantizer.decode(idx_BL)[-1])


def to_float(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Bytes → [-1, 1], as a tokenizer takes them."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_bytes(image: Float[Array, "*B H W 3"]) -> UInt8[Array, "*B H W 3"]:
    """[-1, 1] → 0..255, rounded."""
    return jnp.rint((image + 1) * 127.5).clip(0, 255).astype(jnp.uint8)


def encode(
    tokenizer: Tokenizer,
    image: UInt8[Array, "B H W 3"],
    noise: Int32[Array, "B L"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Int32[Array, "B L"], Int32[Array, "B L"]]:
    """Nearest and used codes of images, as `Quantizer.encode`, a few images at a time.

    `dtype` is of the encoder's activations: bfloat16 changes some codes (docs/numerics.md).
    """

    def run(batch):
        image, noise = batch
        code = tokenizer.quantizer.encode(tokenizer.latent(to_float(image), dtype), noise)
        return code.idx, code.used

    most = tokenizer.config.images_at_a_time
    return in_parts(run, (image, noise), most, backend.whole_parts())


@jax.jit
def encode_images(tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"]) -> Int32[Array, "B L"]:
    """The codes of images, on every device of a mesh."""
    return data_parallel(encode)(tokenizer, image)[0]


def decode_latents(
    tokenizer: Tokenizer, f_hat: Float[Array, "B h w C"], dtype: DTypeLike = jnp.float32
) -> UInt8[Array, "B H W 3"]:
    """Latents → images, a few at a time, activations in `dtype`; on one device."""
    decode = lambda f_hat: to_bytes(tokenizer.reconstruct(f_hat, dtype).clip(-1, 1))
    return in_parts(decode, f_hat, tokenizer.config.images_at_a_time, backend.whole_parts())


@jax.jit
def decode_tokens(tokenizer: Tokenizer, tokens: Int32[Array, "B L"]) -> UInt8[Array, "B H W 3"]:
    """The images of tokens, on every device of a mesh."""
    decode = lambda tokenizer, tokens: decode_latents(
        tokenizer, tokenizer.quantizer.decode(tokens)[-1]
    )
    return data_parallel(decode)(tokenizer, tokens)


@jax.jit
def decode_scales(tokenizer: Tokenizer, tokens: Int32[Array, "B L"]) -> UInt8[Array, "B K H W 3"]:
    """The images after each scale, on every device of a mesh."""

    def decode(tokenizer, tokens):
        sums = jnp.stack(tokenizer.quantizer.decode(tokens), axis=1)
        image = decode_latents(tokenizer, sums.reshape(-1, *sums.shape[2:]))
        return image.reshape(*sums.shape[:2], *image.shape[1:])

    return data_parallel(decode)(tokenizer, tokens)
