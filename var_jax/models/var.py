"""The next-scale transformer (VAR §3.2): AdaLN blocks, all tokens of a scale predicted at once.

The input at scale k is the running sum of all coarser scales, area-averaged to p_k × p_k (scale 1
reads the class embedding).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key

from var_jax.config import TransformerConfig
from var_jax.models import backend, blocks
from var_jax.models.attention import Pattern, attention, dense, prepare
from var_jax.models.blocks import drop_path, layer_norm, modulate, run_blocks, stack_blocks
from var_jax.schedule import level_ids, slices
from var_jax.sharding.mesh import BATCH, layout_of
from var_jax.sharding.ops import (
    flatten_tokens,
    gather_fsdp,
    project,
    reshard,
    take,
    unflatten_tokens,
)

LAYOUT = blocks.LAYOUT | {
    "head_ada": ("fsdp",),
    "head": ("fsdp", "tensor"),
    "class_embed": (None, "fsdp"),
    "pos_embed": (None, "fsdp"),
}
layout = layout_of(LAYOUT)


class Cache(NamedTuple):
    """Keys and values: of the scales decoded so far, or of one layer's new tokens."""

    k: Float[Array, "*depth B L H N"]
    v: Float[Array, "*depth B L H N"]


class Transformer(nnx.Module):
    """Class label and coarser scales → logits of every token. An immutable pytree."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, K, V = config.width, len(config.patch_nums), config.vocab_size
        std = (3 * D) ** -0.5
        draw = lambda *shape, std=std: nnx.Param(std * jax.random.normal(rngs.params(), shape))
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape))
        self.class_embed = draw(config.num_classes + 1, D)  # the last row stands for "no class"
        self.start = draw(1, D)
        self.pos_embed, self.level_embed = draw(config.num_tokens, D), draw(K, D)
        self.word, self.word_bias = draw(config.latent_dim, D), zeros(D)
        if config.shared_adaln:
            self.ada, self.ada_bias = draw(D, 6, D), zeros(6, D)
        self.blocks = stack_blocks(config, rngs.params())
        self.head_ada, self.head_ada_bias = draw(D, 2, D, std=0.5 * std), zeros(2, D)
        self.head, self.head_bias = draw(D, V, std=0.02 * std), zeros(V)
        self.config = config

    def __call__(
        self,
        labels: Int32[Array, " B"],
        x_BMC: Float[Array, "B M C"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L V"]:
        """Logits of all L tokens under teacher forcing.

        Labels are 0..num_classes, the last meaning "no class"; `x_BMC` is the quantizer's
        `teacher_forcing_inputs`, M = L-1. With a `key` drop-path is on.
        """
        cond, x = self.embed_labels(labels), self.embed_inputs(x_BMC)
        x = jnp.concatenate([self.embed_start(labels), x], axis=1)
        config = self.config
        pattern = Pattern.block_causal(config.patch_nums)

        def attend(q, k, v, query):
            how = {"implementation": config.attention, **query}
            return attention(q, k, v, pattern, **how), None

        keep = None if key is None else drop_path(config, key, x.shape[0])
        return self.logits(run_blocks(self.blocks, x, self.block_cond(cond), attend, keep), cond)

    def decode(
        self, k: int, x_BlD: Float[Array, "B l D"], labels: Int32[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B l V"], Cache]:
        """Logits of scale k given the cached keys and values of the scales before it.

        The cache is carried through the layers, each writing its own part: one buffer, in place.
        """
        here = slices(self.config.patch_nums)[k]
        cond = self.embed_labels(labels)

        def layer(carry, numbered_block):
            x, cache = carry
            number, block = numbered_block

            def attend(q, k, v, query):
                q, k = prepare(q, k, **query)
                start = (number, 0, here.start, 0, 0)
                write = lambda c, n: jax.lax.dynamic_update_slice(c, n.astype(c.dtype)[None], start)
                written = jax.tree.map(write, cache, Cache(k, v))
                return dense(q, *(c[number, :, : here.stop] for c in written)), written

            return block(x, block_cond, attend), None

        block_cond = self.block_cond(cond)
        layers = jnp.arange(self.config.depth), self.blocks
        (x, cache), _ = jax.lax.scan(layer, (x_BlD, cache), layers)
        return self.logits(x, cond), cache

    def empty_cache(self, batch: int) -> Cache:
        """A zeroed cache for `batch` sequences, in the compute dtype."""
        c = self.config
        shape = (c.depth, batch, c.num_tokens, c.num_heads, c.head_dim)
        zeros = lambda: reshard(jnp.zeros(shape, self.dtype), None, BATCH, None, "tensor")
        return Cache(zeros(), zeros())

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the blocks."""
        return backend.compute_dtype(self.config.dtype)

    def position(self) -> Float[Array, "L D"]:
        """Where a token lies plus which scale it belongs to."""
        return (
            gather_fsdp(self.pos_embed[...])
            + self.level_embed[...][level_ids(self.config.patch_nums)]
        )

    def embed_labels(self, labels: Int32[Array, " B"]) -> Float[Array, "B D"]:
        """The class as a vector, which also conditions every AdaLN."""
        return take(self.class_embed[...], labels)

    def embed_start(self, labels: Int32[Array, " B"]) -> Float[Array, "B 1 D"]:
        """The input of scale 1."""
        x = self.embed_labels(labels)[:, None] + (self.start[...] + self.position()[:1])[None]
        return x.astype(self.dtype)

    def embed_inputs(self, x_BMC: Float[Array, "B M C"], start: int = 1) -> Float[Array, "B M D"]:
        """The inputs of the tokens from position `start` on."""
        x = project(flatten_tokens(x_BMC), self.word[...]) + self.word_bias[...][None]
        x = unflatten_tokens(x, x_BMC.shape[0])
        return (x + self.position()[None, start : start + x_BMC.shape[1]]).astype(self.dtype)

    def block_cond(self, cond: Float[Array, "B D"]) -> Float[Array, "B ..."]:
        """What the blocks are conditioned on."""
        if not self.config.shared_adaln:
            return cond
        return modulate(cond, self.ada, self.ada_bias, self.dtype)

    def logits(self, x: Float[Array, "B L D"], cond: Float[Array, "B D"]) -> Float[Array, "B L V"]:
        """The head; logits are float32."""
        ada = modulate(cond, self.head_ada, self.head_ada_bias, self.dtype)
        scale, shift = ada[:, 0, None], ada[:, 1, None]
        x = (layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift).astype(self.dtype)
        head = self.head[...].astype(self.dtype)
        logits = project(flatten_tokens(x), head, "tensor", jnp.float32) + self.head_bias[...][None]
        return unflatten_tokens(logits, x.shape[0])


def score_tokens(
    logits: Float[Array, "B L V"], tokens: Int32[Array, "B L"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"], Bool[Array, "B L"]]:
    """The logit of each token, the log of the sum of all exponentials, and if none is larger.

    Sums over the vocabulary instead of look-ups, because it may be split over devices; all in two
    passes over the logits.
    """
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    is_target = jnp.arange(logits.shape[-1])[None, None] == tokens[..., None]
    target = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    total = top + jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1))
    return target, total, target >= top
