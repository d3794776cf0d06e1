"""The codebook as moving averages, and dead-code restart.

A code is the mean of the residuals it stood for, averaged over steps: far fewer steps than by
gradient. Codes that fall out of use are the known way for this tokenizer to collapse; they restart
at a residual of the current batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, Key

from var_jax.schedule import Schedule, lengths, level_ids
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import on_mesh


class CodebookStats(NamedTuple):
    """Moving averages a step: how often a code was used, and the sum of what it stood for."""

    hits: Float[Array, " V"]
    total: Float[Array, "V C"]


def init_stats(codebook: Float[Array, "V C"], hits: float = 0.0) -> CodebookStats:
    """All codes used so often a step; a trained codebook's by 0 would be placed by one batch."""
    return CodebookStats(jnp.full_like(codebook[:, 0], hits), codebook * hits)


def update_codebook(
    codebook: Float[Array, "V C"],
    stats: CodebookStats,
    idx_BL: Int32[Array, "B L"],
    residual_BLC: Float[Array, "B L C"],
    key: Key[Array, ""],
    decay: float,
    restart: float,
    patch_nums: Schedule = (),
    counts_BL: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "V C"], CodebookStats, Bool[Array, " V"], Float[Array, ""]]:
    """The codebook after a batch, its statistics, which codes restarted, perplexity before that.

    With a `decay` of 0 codes are learned by gradient and only restarted here: those that are used
    less than `restart` times the mean. They restart at residuals of any tokens, or of each scale of
    `patch_nums` alike. Tokens that do not count by `counts_BL` move no code, and a code that would
    restart at one waits for another batch.
    """
    V, moving_average = codebook.shape[0], bool(decay)
    decay = decay or 0.99
    B, L = idx_BL.shape
    rows = random_tokens(key, V, B, L, patch_nums)
    hits, total, fresh, counted = batch_stats(idx_BL, residual_BLC, rows, counts_BL)
    mean_hits = hits.sum() / V
    hits = decay * stats.hits + (1 - decay) * hits
    total = decay * stats.total + (1 - decay) * total
    share = hits / hits.sum()
    perplexity = jnp.exp(-jnp.sum(share * jnp.log(share + 1e-12)))
    dead = (counted > 0) & (hits < restart * mean_hits)
    if moving_average:
        used = hits[:, None] > 1e-12
        codebook = jnp.where(used, total / jnp.maximum(hits, 1e-12)[:, None], codebook)
    codebook = jnp.where(dead[:, None], fresh, codebook)
    # A restarted code counts as used a few times, so that the next batches can move it.
    hits = jnp.where(dead, 3 * restart * mean_hits, hits)
    total = jnp.where(dead[:, None], fresh * hits[:, None], total)
    return codebook, CodebookStats(hits, total), dead, perplexity


def random_tokens(
    key: Key[Array, ""], count: int, B: int, L: int, patch_nums: Schedule = ()
) -> Int32[Array, " count"]:
    """Numbers of tokens (B,L): any alike, or with `patch_nums` each scale alike, so that the
    coarsest, whose tokens are few, gets its share.
    """
    if not patch_nums:
        return jax.random.randint(key, (count,), 0, B * L)
    of_scale, of_token, of_image = jax.random.split(key, 3)
    sizes = jnp.array(lengths(patch_nums))
    scale = jax.random.randint(of_scale, (count,), 0, len(patch_nums))
    size, start = sizes[scale], (jnp.cumsum(sizes) - sizes)[scale]
    place = jnp.floor(jax.random.uniform(of_token, (count,)) * size.astype(jnp.float32))
    place = place.astype(jnp.int32).clip(max=size - 1)
    return jax.random.randint(of_image, (count,), 0, B) * L + start + place


def batch_stats(
    idx_BL: Int32[Array, "B L"],
    residual_BLC: Float[Array, "B L C"],
    rows_V: Int32[Array, " V"],
    counts_BL: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, " V"], Float[Array, "V C"], Float[Array, "V C"], Float[Array, " V"]]:
    """Hits a code, sum of residuals a code, the residuals numbered `rows_V`, 1 where these count.

    All tokens do, or those of `counts_BL`.

    Each device counts its own part of the batch; results are the same on every mesh, but for the
    order in which floats are summed.
    """
    V, C = rows_V.shape[0], residual_BLC.shape[-1]

    def count(idx, residual, counts, rows, part: Array | int = 0):
        idx, residual = idx.reshape(-1), residual.reshape(-1, C)
        weight = jnp.ones(idx.shape) if counts is None else counts.reshape(-1).astype(jnp.float32)
        hits = jnp.zeros(V).at[idx].add(weight)
        total = jnp.zeros((V, C)).at[idx].add(residual * weight[:, None])
        here = rows - part * idx.shape[0]
        mine = (here >= 0) & (here < idx.shape[0])
        here = here.clip(0, idx.shape[0] - 1)
        pick = lambda x: jnp.where(mine[:, None], x[here], 0.0)
        return hits, total, pick(residual), pick(weight[:, None])[:, 0]

    def count_and_sum(*batch):
        return jax.lax.psum(count(*batch, part=jax.lax.axis_index(BATCH)), BATCH)

    batch = idx_BL, residual_BLC, counts_BL, rows_V
    if not on_mesh():
        return count(*batch)
    specs = P(BATCH), P(BATCH), P(BATCH), P()
    return jax.shard_map(count_and_sum, in_specs=specs, out_specs=P())(*batch)


def codes_by_scale(
    idx_BL: Int32[Array, "B L"], num_codes: int, patch_nums: Schedule
) -> Int32[Array, " K"]:
    """How many codes each scale of a batch uses: collapse begins unseen, at the coarsest."""
    levels, K = level_ids(patch_nums), len(patch_nums)
    count = lambda idx_BL: jnp.zeros((K, num_codes)).at[levels, idx_BL].add(1.0)
    if not on_mesh():
        return (count(idx_BL) > 0).sum(axis=1)
    count_and_sum = lambda idx_BL: jax.lax.psum(count(idx_BL), BATCH)
    hits = jax.shard_map(count_and_sum, in_specs=P(BATCH), out_specs=P())(idx_BL)
    return (hits > 0).sum(axis=1)
