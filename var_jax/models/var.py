"""The next-scale transformer (VAR §3.2): AdaLN blocks, all tokens of a scale predicted at once.

The input at scale k is the running sum of all coarser scales, area-averaged to p_k × q_k (scale 1
reads the class embedding).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key

from var_jax.config import TransformerConfig
from var_jax.models.attention_tpu import whole_tiles
from var_jax.models.backbone import Backbone, Condition, normal, zeros
from var_jax.models.cache import Cache, add_block, attend_to_blocks
from var_jax.models.quantizer import Quantizer
from var_jax.schedule import level_ids, num_tokens
from var_jax.sharding.ops import (
    data_parallel,
    flatten_tokens,
    gather_fsdp,
    project,
    unflatten_tokens,
)
from var_jax.tools.trees import path_name


class Transformer(Backbone):
    """Class label and coarser scales → logits of every token."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, K, std = config.width, len(config.patch_nums), (3 * config.width) ** -0.5
        draw = lambda *shape: normal(shape, std, rngs)
        self.class_embed = draw(config.num_classes + 1, D)  # the last row stands for "no class"
        self.start = draw(1, D)
        self.pos_embed, self.level_embed = draw(config.num_tokens, D), draw(K, D)
        self.word, self.word_bias = draw(config.latent_dim, D), zeros(D)
        super().__init__(config, config.vocab_size, rngs=rngs)

    def __call__(
        self,
        labels: Int32[Array, " B"],
        x_BMC: Float[Array, "B M C"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L V"]:
        """Logits of all L tokens under teacher forcing.

        Labels are 0..num_classes, the last meaning "no class"; `x_BMC` are the `inputs` of the
        tokens, M = L-1. With a `key` drop-path is on.
        """
        cond, x = self.embed_labels(labels), self.embed_inputs(x_BMC)
        x = jnp.concatenate([self.embed_start(labels), x], axis=1)
        return self.head_out(self.run(x, cond, key), cond)

    def first_scales(self, count: int) -> "Transformer":
        """The model of the `count` coarsest scales, which see no finer ones; weights are shared."""
        patch_nums = self.config.patch_nums[:count]
        kept = {"pos_embed": num_tokens(patch_nums), "level_embed": count}
        part = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf[: kept.get(path_name(path), len(leaf))], self
        )
        part.config = dataclasses.replace(self.config, patch_nums=patch_nums)
        return part

    @staticmethod
    def inputs(quantizer: Quantizer, tokens: Int32[Array, "B L"]) -> Float[Array, "B M C"]:
        """What is read to predict tokens: of each scale after the first the sum of those before."""
        return data_parallel(Quantizer.teacher_forcing_inputs)(quantizer, tokens)

    def decode(
        self,
        k: int,
        x_BMD: Float[Array, "B M D"],
        condition: Condition,
        cache: Cache,
        *,
        anew: bool = False,
        last: bool = False,
    ) -> tuple[Float[Array, "B l V"], Cache]:
        """Logits of scale k, and the cache that scale k+1 needs, unless this is the `last`.

        `x_BMD` are the inputs of scale k, and the cache is of scale k-1; or, `anew`, the inputs of
        all scales up to k, and the cache is empty.
        """
        pattern = self.config.pattern
        attend = attend_to_blocks(pattern, k, anew, self.cached_attention())
        x, new = self.run_cached(x_BMD, condition, cache, attend)
        cache = cache if last else add_block(pattern, k, anew, cache, new)
        return self.head_out(x[:, -pattern.blocks[k] :], condition), cache

    def cache_for(self, batch: int, scales: int) -> Cache:
        """A zeroed cache for sampling the first `scales` scales of `batch` sequences."""
        return self.empty_cache(batch, whole_tiles(self.config.pattern.room(scales)))

    def position(self) -> Float[Array, "L D"]:
        """Where a token lies plus which scale it belongs to."""
        return (
            gather_fsdp(self.pos_embed[...])
            + self.level_embed[...][level_ids(self.config.patch_nums)]
        )

    def embed_start(self, labels: Int32[Array, " B"]) -> Float[Array, "B 1 D"]:
        """The input of scale 1."""
        x = self.embed_labels(labels)[:, None] + (self.start[...] + self.position()[:1])[None]
        return x.astype(self.dtype)

    def embed_inputs(self, x_BMC: Float[Array, "B M C"], start: int = 1) -> Float[Array, "B M D"]:
        """The inputs of the tokens from position `start` on."""
        x = project(flatten_tokens(x_BMC), self.word[...]) + self.word_bias[...][None]
        x = unflatten_tokens(x, x_BMC.shape[0])
        return (x + self.position()[None, start : start + x_BMC.shape[1]]).astype(self.dtype)


def likeliest(logits: Float[Array, "B L V"]) -> Int32[Array, "B L"]:
    """The first of the codes with the largest logit; the vocabulary may be split over devices."""
    codes = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    largest = logits >= logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, codes, logits.shape[-1]).min(axis=-1)


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
