"""Any number of images from any kind of model, batch by batch, each from (seed, index) alone.

A model's sampler is a function (weights, labels, keys, known) → (images uint8 (B,H,W,3), tokens or
None), all arrays on the device; `sampling.autoregressive.sample` is VAR's. `sampler_of` chooses it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32, Key, UInt8

from var_jax.config import SamplingConfig
from var_jax.models.tokenizer import Tokenizer, decode_scales, decode_tokens, encode_images
from var_jax.sampling import autoregressive, diffusion, raster
from var_jax.sharding.mesh import local_rows
from var_jax.sharding.ops import round_up
from var_jax.sharding.rows import fetch, in_batches, put

Sampler = Callable[..., tuple[Array, Array | None]]
KINDS = {"var": autoregressive, "raster": raster, "dit": diffusion}


class Generated(NamedTuple):
    """Some images, which of those asked for they are, and their tokens if the model has any."""

    rows: Int32[np.ndarray, " b"]
    images: UInt8[np.ndarray, "b H W 3"]
    tokens: Int32[np.ndarray, "b L"] | None


def sampler_of(kind: str, settings: SamplingConfig, smooth: bool = False) -> functools.partial:
    """The sampler of a kind of transformer. Raises: BadInput for `smooth` where that is no VAR."""
    return KINDS[kind].sampler(settings, smooth)


def image_keys(seed: int, index: Int32[Array, " B"]) -> Key[Array, " B"]:
    """One key an image, from (seed, index) alone: batch size and devices do not matter."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)


def generate(
    sampler: Sampler,
    weights: Any,
    labels: Int32[np.ndarray, " N"],
    *,
    batch_size: int,
    seed: int = 0,
    index: Int32[np.ndarray, " N"] | None = None,
    known: Any = None,
    everywhere: bool = False,
) -> Iterator[Generated]:
    """Images in order, each from `seed` and its `index` (default: 0..N-1).

    `known`, a tree of arrays of N rows, goes to the sampler. `batch_size` is rounded up to what the
    mesh splits evenly; the last batch is padded, so that one compiled program serves all. Of
    several processes each gets the rows that its own devices made, or all of them if `everywhere`.
    The next batch is under way on the devices while one is fetched.
    """
    size, fetched = round_up(batch_size), fetch_all if everywhere else fetch_local
    index = np.arange(len(labels), dtype=np.int32) if index is None else index
    waiting: tuple[Any, ...] | None = None
    for start in range(0, len(labels), size):
        rows = np.arange(start, min(start + size, len(labels)), dtype=np.int32)
        batch = jax.tree.map(lambda x, rows=rows: put(x[np.resize(rows, size)]), (labels, known))
        keys = image_keys(seed, put(index[np.resize(rows, size)]))
        samples = sampler(weights, batch[0], keys, batch[1])
        if waiting:
            yield fetched(*waiting)
        waiting = rows, *samples
    if waiting:
        yield fetched(*waiting)


def fetch_local(rows: np.ndarray, images: Array, tokens: Array | None) -> Generated:
    """This process's part of a batch, without the padding."""
    here, mine = local_rows(images)
    kept = here < len(rows)
    codes = None if tokens is None else local_rows(tokens)[1][kept]
    return Generated(rows[here[kept]], mine[kept], codes)


def fetch_all(rows: np.ndarray, images: Array, tokens: Array | None) -> Generated:
    """The batch without the padding, on every process."""
    codes = None if tokens is None else fetch(tokens, len(rows))
    return Generated(rows, fetch(images, len(rows)), codes)


def generate_all(
    sampler: Sampler, weights: Any, labels: Int32[np.ndarray, " N"], **rest: Any
) -> Generated:
    """What `generate` makes, as one, on every process."""
    parts = generate(sampler, weights, labels, everywhere=True, **rest)
    rows, images, tokens = zip(*parts, strict=True)
    codes = None if tokens[0] is None else np.concatenate(tokens)
    return Generated(np.concatenate(rows), np.concatenate(images), codes)


def coarse_to_fine(
    tokenizer: Tokenizer, tokens: Int32[np.ndarray, "N L"], batch_size: int = 64
) -> UInt8[np.ndarray, "N K H W 3"]:
    """What images look like after each scale: the running sums of their tokens, decoded."""
    return in_batches(decode_scales, tokenizer, tokens, batch_size)


def reconstruct_images(
    tokenizer: Tokenizer, images: UInt8[np.ndarray, "N H W 3"]
) -> UInt8[np.ndarray, "N H W 3"]:
    """Images through the tokenizer and back."""
    tokens = in_batches(encode_images, tokenizer, images)
    return in_batches(decode_tokens, tokenizer, tokens)
