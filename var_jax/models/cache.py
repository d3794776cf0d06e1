"""Keys and values that are kept while tokens are predicted, and attention over them.

New tokens attend to those in the cache and to themselves; then those that a later token sees are
added to the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from var_jax.models import attention_tpu
from var_jax.models.attention import attention, dense, prepare
from var_jax.models.backend import platform
from var_jax.schedule import Pattern
from var_jax.sharding.ops import merge_heads, split_heads

FEWEST = attention_tpu.PACKED  # new tokens that are worth a kernel


class Cache(NamedTuple):
    """Keys and values of all layers, or new ones of one layer.

    The heads are one axis: TPUs pad a last axis of 64 to 128.
    """

    k: Float[Array, "*depth B S HN"]
    v: Float[Array, "*depth B S HN"]


def attend_to_blocks(
    pattern: Pattern, first: int, last: int, kernel: bool
) -> Callable[..., tuple[Array, Cache]]:
    """Attention of the tokens of a block, or of all up to it: blocks `first` to `last`.

    The cache holds what the block before `first` left: the tokens that `first` sees. As a kernel,
    keys are taken as they are; else q and k are as of `prepare`.
    """
    seen, after = pattern.seen[first].start, pattern.seen[last + 1 : last + 2]
    kept = pattern.seen[first].stop - pattern.blocks[first] - seen
    new = Pattern(pattern.blocks[first : last + 1], pattern.window)

    def attend(
        cache: Cache,
        layer: Int32[Array, ""],
        q: Float[Array, "B l H N"],
        k: Float[Array, "B l H N"],
        v: Float[Array, "B l H N"],
        query: dict[str, Any],
    ) -> tuple[Float[Array, "B l H N"], Cache]:
        if not kernel:
            (q, k), query = prepare(q, k, **query), {}
        fused = kernel and q.shape[1] >= FEWEST
        if not kept:
            how = {"implementation": "kernel" if fused else "blocks", **query}
            mixed = attention(q, k, v, new, **how)
        elif fused:
            how = {"kept": kept, "interpret": platform() != "tpu", **query}
            mixed = attention_tpu.cached(q, k, v, *cache, layer, **how)
        else:
            both = jax.tree.map(lambda c, x: joined(c[layer, :, :kept], x), cache, Cache(k, v))
            keys, values = (split_heads(x, q.shape[-1]) for x in both)
            q, keys = prepare(q, keys, **query) if kernel else (q, keys)
            mixed = dense(q, keys, values)
        if after:
            dropped = after[0].start - seen
            write = lambda c, x: written(c, layer, x, kept, dropped)
            cache = jax.tree.map(write, cache, Cache(k, v))
        return mixed, cache

    return attend


def written(
    cache: Float[Array, "depth B S HN"],
    layer: Int32[Array, ""],
    new: Float[Array, "B l H N"],
    kept: int | Int32[Array, ""],
    dropped: int = 0,
) -> Float[Array, "depth B S HN"]:
    """The cache with new tokens behind its first `kept`, and without the `dropped` first ones."""
    if dropped:
        new, kept = joined(cache[layer, :, :kept], new)[:, dropped:], 0
    else:
        new = merge_heads(new).astype(cache.dtype)
    return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, kept, 0))


def joined(kept: Float[Array, "B s HN"], new: Float[Array, "B l H N"]) -> Float[Array, "B S HN"]:
    """Kept tokens, then new ones."""
    return jnp.concatenate([kept, merge_heads(new).astype(kept.dtype)], axis=1)


def attend_to_tokens(t: Int32[Array, ""]) -> Callable[..., tuple[Array, Cache]]:
    """Attention of the token at position `t`; the cache has room for all tokens."""

    def attend(cache: Cache, layer, q, k, v, query):
        q, k = prepare(q, k, **query)
        cache = jax.tree.map(lambda c, x: written(c, layer, x, t), cache, Cache(k, v))
        seen = jnp.arange(cache.k.shape[2]) <= t
        k, v = (split_heads(c[layer], q.shape[-1]) for c in cache)
        return dense(q, k, v, seen[None]), cache

    return attend
