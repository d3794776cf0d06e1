"""A tokenizer for small images that learns in minutes: a linear map of patches beside the CNN.

Training begins at the quality of plain vector quantization of patches, and the CNN, which works on
patches folded into channels, learns only what context adds.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from var_jax.config import TokenizerConfig
from var_jax.models.tokenizer import HIGH, Tokenizer


class PatchCodec(Tokenizer):
    """A `Tokenizer` around whose CNN patches also take a linear path, an orthogonal map.

    All else is silent at the start: the last convolutions of encoder and decoder are zeros, phi the
    identity.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        patch, C = 3 * config.downsample**2, config.latent_dim
        analysis = jax.nn.initializers.orthogonal()(rngs.params(), (patch, C))
        self.analysis, self.synthesis = nnx.Param(analysis), nnx.Param(analysis.T)
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            last.kernel, last.bias = jax.tree.map(jnp.zeros_like, (last.kernel, last.bias))
        self.pre_conv.bias = jax.tree.map(jnp.zeros_like, self.pre_conv.bias)
        identity = jnp.zeros((3, 3, C, C)).at[1, 1].set(jnp.eye(C))
        kernel, bias = self.quantizer.phi_kernel, self.quantizer.phi_bias
        self.quantizer.phi_kernel = nnx.Param(jnp.broadcast_to(identity, kernel.shape))
        self.quantizer.phi_bias = nnx.Param(jnp.zeros(bias.shape))

    def latent(
        self, image: Float[Array, "B H W 3"], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "B h w C"]:
        """The latent that the quantizer explains; `dtype` is of the CNN's activations."""
        folded = space_to_depth(image, self.config.patch_size).astype(dtype)
        latent = self.pre_conv(self.encoder(folded).astype(jnp.float32))
        patches = space_to_depth(image, self.config.downsample)
        return latent + jnp.matmul(patches, self.analysis[...], precision=HIGH)

    def reconstruct(
        self, f_hat: Float[Array, "B h w C"], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "B H W 3"]:
        """Quantized latent → image, clipped, so that training has room beyond black and white."""
        patches = jnp.matmul(f_hat, self.synthesis[...], precision=HIGH)
        folded = self.decoder(self.post_conv(f_hat).astype(dtype)).astype(jnp.float32)
        image = depth_to_space(folded, self.config.patch_size)
        return (image + depth_to_space(patches, self.config.downsample)).clip(-1, 1)


def make_tokenizer(config: TokenizerConfig, *, rngs: nnx.Rngs) -> Tokenizer:
    """The tokenizer of a config: a `PatchCodec` where images are cut into patches."""
    return (PatchCodec if config.patch_size > 1 else Tokenizer)(config, rngs=rngs)


def space_to_depth(x: Float[Array, "B H W C"], p: int) -> Float[Array, "B h w ppC"]:
    """Folds each p × p patch into channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // p, W // p, p * p * C)


def depth_to_space(x: Float[Array, "B h w ppC"], p: int) -> Float[Array, "B H W C"]:
    """The inverse of `space_to_depth`."""
    B, h, w, D = x.shape
    x = x.reshape(B, h, w, p, p, D // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * p, w * p, D // (p * p))
