"""Keys and values that are kept while tokens are predicted, and attention over them.

New tokens attend to those in the cache and to themselves; after the last layer, those that a later
token sees are added to the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from var_jax.models import attention_tpu
from var_jax.models.attention import attention, cudnn, dense, prepare
from var_jax.models.backend import platform
from var_jax.schedule import Pattern
from var_jax.sharding.ops import merge_heads, split_heads

FEWEST = attention_tpu.PACKED  # new tokens that are worth a kernel or cuDNN


class Cache(NamedTuple):
    """Keys and values of all layers, or new ones of one layer.

    The heads are one axis: TPUs pad a last axis of 64 to 128.
    """

    k: Float[Array, "*depth B S HN"]
    v: Float[Array, "*depth B S HN"]


Attend = Callable[..., tuple[Float[Array, "B l H N"], Cache]]


def attend_to_blocks(pattern: Pattern, k: int, anew: bool, implementation: str) -> Attend:
    """Attention of the tokens of block `k`, which see what block k-1 left in the cache.

    `anew`: of all tokens up to it, and the cache is empty. Returns what is mixed, and the new keys
    and values. With a kernel the cache holds keys as they are projected, else as of `prepare`.
    """
    kept, kernel = 0 if anew else pattern.left(k - 1), implementation == "kernel"
    new = Pattern(pattern.blocks[0 if anew else k : k + 1], pattern.window)

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
        many, new_kv = q.shape[1] >= FEWEST, merged(cache, k, v)
        if not kept:
            options = {"implementation": implementation if many else "blocks", **query}
            return attention(q, k, v, new, **options), new_kv
        if kernel and many:
            options = {"kept": kept, "interpret": platform() != "tpu", **query}
            return attention_tpu.cached(q, k, v, *cache, layer, **options), new_kv
        keys, values = joined(cache, layer, new_kv, kept, q.shape[-1])
        q, keys = prepare(q, keys, **query) if kernel else (q, keys)
        fused = cudnn if implementation == "cudnn" and many else dense
        return fused(q, keys, values), new_kv

    return attend


def attend_to_tokens(t: Int32[Array, ""]) -> Attend:
    """Attention of the token at position `t`, of which the cache holds all tokens before it."""

    def attend(cache: Cache, layer, q, k, v, query):
        q, k = prepare(q, k, **query)
        new_kv, room = merged(cache, k, v), cache.k.shape[2]
        keys, values = joined(cache, layer, new_kv, room, q.shape[-1])
        position = jnp.arange(room + 1)
        seen: Bool[Array, "1 S"] = ((position < t) | (position == room))[None]
        return dense(q, keys, values, seen), new_kv

    return attend


def merged(cache: Cache, k: Float[Array, "B l H N"], v: Float[Array, "B l H N"]) -> Cache:
    """New keys and values of a layer, as the cache has them."""
    return jax.tree.map(lambda c, x: merge_heads(x).astype(c.dtype), cache, Cache(k, v))


def joined(cache: Cache, layer: Int32[Array, ""], new: Cache, kept: int, head_dim: int) -> Cache:
    """The first `kept` keys and values of a layer, then the new ones; in heads."""
    join = lambda c, x: jnp.concatenate([c[layer, :, :kept], x], axis=1)
    return jax.tree.map(lambda c, x: split_heads(join(c, x), head_dim), cache, new)


def add_block(pattern: Pattern, k: int, anew: bool, cache: Cache, new: Cache) -> Cache:
    """The cache after block `k`: what block k+1 sees, of the cache and the `new` of all layers."""
    kept, left = 0 if anew else pattern.left(k - 1), pattern.left(k)

    def add(c: Float[Array, "depth B S HN"], x: Float[Array, "depth B l HN"]):
        place = kept
        if left < kept + x.shape[2]:  # the window has moved on
            x, place = jnp.concatenate([c[:, :, :kept], x], axis=2)[:, :, -left:], 0
        return jax.lax.dynamic_update_slice(c, x, (0, 0, place, 0))

    return jax.tree.map(add, cache, new) if left else cache


def add_token(t: Int32[Array, ""], cache: Cache, new: Cache) -> Cache:
    """The cache with the token at position `t`."""
    add = lambda c, x: jax.lax.dynamic_update_slice(c, x, (0, 0, t, 0))
    return jax.tree.map(add, cache, new)
