"""A data source in order, read by all hosts together."""

import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Int

from var_jax.data.pipeline import Batch, epoch
from var_jax.data.sources import Source

READ = 64  # items that a thread reads in a row


def in_order(
    source: Source, size: int, rows: Int[np.ndarray, " N"] | None = None
) -> Iterator[Batch]:
    """Every item, or those of `rows`, `size` at a time and the last time fewer, on every process.

    Each process reads its share by threads some way ahead, and gets the rest from the others, so
    all of them must take the same batches.
    """
    rows = np.arange(len(source)) if rows is None else rows
    count, me = jax.process_count(), jax.process_index()
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    padded = [np.resize(part, -(-len(part) // count) * count) for part in parts]
    shares = [part.reshape(count, -1)[me] for part in padded]
    at_once = math.gcd(len(shares[0]), READ)
    read = epoch(source, at_once, rows=np.concatenate(shares).tolist())
    for part, share in zip(parts, shares, strict=True):
        batches = [*itertools.islice(read, -(-len(share) // at_once))]
        masks = [batch.pop("mask") for batch in batches]
        join = lambda name, masks=masks, batches=batches: np.concatenate(
            [batch[name][mask] for batch, mask in zip(batches, masks, strict=True)]
        )
        own = {name: join(name) for name in batches[0]}
        whole = process_allgather(own, tiled=True) if count > 1 else own
        yield {name: values[: len(part)] for name, values in whole.items()}
