"""Any number of images from any kind of model, batch by batch, each from (seed, index) alone.

A model's sampler is a function (weights, labels, keys, known) → (images uint8 (B,H,W,3), tokens or
None), all arrays on the device; `sampling.autoregressive.sample` is VAR's.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key, UInt8

from var_jax.models.tokenizer import Tokenizer, to_bytes
from var_jax.sharding.mesh import local_rows, put_global_batch
from var_jax.sharding.ops import data_parallel, in_parts, on_mesh, round_up

Sampler = Callable[..., tuple[Array, Array | None]]


class Generated(NamedTuple):
    """Some images, which of those asked for they are, and their tokens if the model has any."""

    rows: Int32[np.ndarray, " b"]
    images: UInt8[np.ndarray, "b H W 3"]
    tokens: Int32[np.ndarray, "b L"] | None


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
) -> Iterator[Generated]:
    """Images in order, each from `seed` and its `index` (default: 0..N-1).

    `known`, a tree of arrays of N rows, goes to the sampler. `batch_size` is rounded up to what the
    mesh splits evenly; the last batch is padded, so that one compiled program serves all. Of
    several processes each gets the rows that its own devices made. The next batch is under way on
    the devices while one is fetched.
    """
    size = round_up(min(batch_size, len(labels)))
    index = np.arange(len(labels), dtype=np.int32) if index is None else index
    waiting: tuple[Any, ...] | None = None
    for start in range(0, len(labels), size):
        rows = np.arange(start, min(start + size, len(labels)), dtype=np.int32)
        batch = jax.tree.map(lambda x, rows=rows: put(x[np.resize(rows, size)]), (labels, known))
        keys = image_keys(seed, put(index[np.resize(rows, size)]))
        made = sampler(weights, batch[0], keys, batch[1])
        if waiting:
            yield fetch(*waiting)
        waiting = rows, *made
    if waiting:
        yield fetch(*waiting)


def fetch(rows: np.ndarray, images: Array, tokens: Array | None) -> Generated:
    """This process's part of a batch, without the padding."""
    here, mine = local_rows(images)
    kept = here < len(rows)
    codes = None if tokens is None else local_rows(tokens)[1][kept]
    return Generated(rows[here[kept]], mine[kept], codes)


def collect(parts: Iterator[Generated]) -> Generated:
    """All of this process's images together."""
    rows, images, tokens = zip(*parts, strict=True)
    codes = None if tokens[0] is None else np.concatenate(tokens)
    return Generated(np.concatenate(rows), np.concatenate(images), codes)


def coarse_to_fine(
    tokenizer: Tokenizer, tokens: Int32[np.ndarray, "N L"]
) -> tuple[Int32[np.ndarray, " n"], UInt8[np.ndarray, "n K H W 3"]]:
    """What images look like after each scale: the running sums of their codes, decoded.

    Of several processes each gets some rows: which they are comes first.
    """
    count = len(tokens)
    sums = running_sums(tokenizer, put(np.resize(tokens, (round_up(count), tokens.shape[1]))))
    steps = [local_rows(decode_sum(tokenizer, f_hat)) for f_hat in sums]
    rows = steps[0][0]
    return rows[rows < count], np.stack([images[rows < count] for _, images in steps], axis=1)


@jax.jit
def running_sums(tokenizer: Tokenizer, tokens: Int32[Array, "N L"]) -> list[Array]:
    """The quantized latent after each scale."""
    return data_parallel(lambda t, tokens: t.quantizer.decode(tokens))(tokenizer, tokens)


@jax.jit
def decode_sum(tokenizer: Tokenizer, f_hat: Array) -> UInt8[Array, "N H W 3"]:
    """Quantized latents as images."""
    return data_parallel(lambda t, f_hat: to_bytes(t.decode_latent(f_hat)))(tokenizer, f_hat)


@jax.jit
def decode_tokens(tokenizer: Tokenizer, tokens: Int32[Array, "N L"]) -> UInt8[Array, "N H W 3"]:
    """Tokens as images."""
    decode = lambda tokenizer, tokens: in_parts(
        lambda tokens: to_bytes(tokenizer.decode(tokens)),
        tokens,
        tokenizer.config.images_at_a_time,
    )
    return data_parallel(decode)(tokenizer, tokens)


def in_batches(
    f: Callable[[Any, Array], Array], weights: Any, rows: np.ndarray, batch_size: int
) -> np.ndarray:
    """`f(weights, rows)` of any number of rows, a batch at a time; the last one is padded.

    Of several processes each gets the rows of its own devices.
    """
    size, made = round_up(min(batch_size, len(rows))), []
    for start in range(0, len(rows), size):
        count = min(size, len(rows) - start)
        batch = put(np.resize(rows[start : start + count], (size, *rows.shape[1:])))
        here, values = local_rows(f(weights, batch))
        made.append(values[here < count])
    return np.concatenate(made)


def put(array: np.ndarray) -> jax.Array:
    """Rows that every process holds, onto the mesh if there is one."""
    return put_global_batch(array, jax.sharding.get_mesh()) if on_mesh() else jnp.asarray(array)
