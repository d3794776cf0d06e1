"""The diffusion baseline: a transformer that predicts the flow from image to noise (DiT).

Peebles and Xie, arXiv 2212.09748, on the latents of the tokenizer before quantization, and with the
straight paths of rectified flow (Liu et al., arXiv 2209.03003): x_t = (1-t)·x_0 + t·noise, of which
it learns the velocity noise - x_0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TransformerConfig
from var_jax.models.backbone import LAYOUT, Backbone, normal, ones, zeros
from var_jax.schedule import Size, shape_of
from var_jax.sharding.mesh import layout_of
from var_jax.sharding.ops import flatten_tokens, project, reshape, unflatten_tokens
from var_jax.tools.trees import path_name

FREQUENCIES = 128  # sines and as many cosines of the time
CALIBRATION = 100  # batches whose latents are measured


class Statistics(NamedTuple):
    """Mean and deviation of each channel of latents, over so many batches."""

    mean: Float[Array, " C"]
    std: Float[Array, " C"]
    batches: Float[Array, ""]

    def normalize(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Latents at mean 0 and variance 1 in each channel."""
        return (latent - self.mean[None, None, None]) / self.std[None, None, None]

    def denormalize(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The inverse of `normalize`."""
        return x * self.std[None, None, None] + self.mean[None, None, None]

    def updated(self, mean: Float[Array, " C"], square: Float[Array, " C"]) -> "Statistics":
        """The statistics with a batch's mean and mean square; after `CALIBRATION` they stay."""
        share = jnp.where(self.batches < CALIBRATION, 1 / (self.batches + 1), 0.0)
        average = lambda old, new: old + share * (new - old)
        mean, square = average(self.mean, mean), average(self.std**2 + self.mean**2, square)
        std = jnp.sqrt(jnp.maximum(square - mean**2, 1e-6))
        return Statistics(mean, std, jnp.minimum(self.batches + 1, CALIBRATION))


class DiT(Backbone):
    """Class label, noisy latent and time → velocity. Latents are normalized by channel."""

    layout = staticmethod(layout_of(LAYOUT | {"head": ("fsdp",), "time_out": ("fsdp",)}))

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, C = config.width, config.latent_dim
        patch = config.patch_size**2 * C
        self.class_embed = normal((config.num_classes + 1, D), 0.02, rngs)
        self.time_in, self.time_in_bias = normal((2 * FREQUENCIES, D), 0.02, rngs), zeros(D)
        self.time_out, self.time_out_bias = normal((D, D), 0.02, rngs), zeros(D)
        self.word, self.word_bias = normal((patch, D), (3 * patch) ** -0.5, rngs), zeros(D)
        super().__init__(config, patch, rngs=rngs)
        self.head = zeros(D, patch)
        # Of the training set's latents: training measures them, no gradient changes them.
        self.latent_mean, self.latent_std, self.latent_batches = zeros(C), ones(C), zeros()

    def __call__(
        self,
        labels: Int32[Array, " B"],
        x_BhwC: Float[Array, "B h w C"],
        time: Float[Array, " B"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B h w C"]:
        """The velocity at `x_BhwC`, a normalized latent at times in [0, 1], 1 being noise.

        Labels are 0..num_classes, the last meaning "no class". With a `key` drop-path is on.
        """
        c, cond = self.config, self.embed_labels(labels) + self.embed_time(time)
        x_BLP = patches(x_BhwC, c.patch_size)
        x = project(flatten_tokens(x_BLP), self.word[...]) + self.word_bias[...][None]
        h, w = (side // c.patch_size for side in x_BhwC.shape[1:3])
        position = sincos_positions((h, w), c.width)
        x = (unflatten_tokens(x, len(labels)) + position[None]).astype(self.dtype)
        velocity = self.head_out(self.run(x, cond, key), cond, split=None)
        return from_patches(velocity, c.patch_size, h)

    def embed_time(self, time: Float[Array, " B"]) -> Float[Array, "B D"]:
        """Sines and cosines of the time, then two layers."""
        rates = 10_000.0 ** -(np.arange(FREQUENCIES, dtype=np.float32) / FREQUENCIES)
        angle = 1000 * time[:, None] * rates[None]
        wave = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
        layer = lambda x, w, bias: project(x, w[...]) + bias[...][None]
        hidden = jax.nn.silu(layer(wave, self.time_in, self.time_in_bias))
        return layer(hidden, self.time_out, self.time_out_bias)

    @property
    def statistics(self) -> Statistics:
        """What latents are normalized by."""
        kept = self.latent_mean[...], self.latent_std[...], self.latent_batches[...]
        return Statistics(*jax.lax.stop_gradient(kept))

    def with_statistics(self, statistics: Statistics) -> "DiT":
        """This model with other statistics."""
        new = {f"latent_{name}": value for name, value in statistics._asdict().items()}
        place = lambda path, leaf: new.get(path_name(path), leaf)
        return jax.tree_util.tree_map_with_path(place, self)


def patches(x: Float[Array, "B h w C"], p: int) -> Float[Array, "B L ppC"]:
    """A token for each p × p patch."""
    B, h, w, C = x.shape
    x = reshape(x, B, h // p, p, w // p, p, C).transpose(0, 1, 3, 2, 4, 5)
    return reshape(x, B, h * w // p**2, p * p * C)


def from_patches(x: Float[Array, "B L ppC"], p: int, rows: int) -> Float[Array, "B h w C"]:
    """The inverse of `patches`, of so many rows of patches."""
    B, L, P = x.shape
    columns, C = L // rows, P // p**2
    x = reshape(x, B, rows, columns, p, p, C).transpose(0, 1, 3, 2, 4, 5)
    return reshape(x, B, rows * p, columns * p, C)


def sincos_positions(size: Size, width: int) -> Float[np.ndarray, "L D"]:
    """Fixed positions on a grid: sines and cosines of y, then of x (DiT §3.2)."""
    rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    h, w = shape_of(size)
    angle = np.arange(max(h, w))[:, None] * rates
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    grid = np.concatenate([line[:h, None].repeat(w, 1), line[None, :w].repeat(h, 0)], axis=2)
    flat = grid.reshape(h * w, -1).astype(np.float32)
    return np.pad(flat, ((0, 0), (0, width - flat.shape[1])))
