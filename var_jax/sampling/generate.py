"""Any number of images, batch by batch, each from (seed, index) alone."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt8

from var_jax.models.partition import BATCH, pin, round_up
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import Transformer
from var_jax.sampling.decode import image_keys, sample


def generate(
    transformer: Transformer,
    tokenizer: Tokenizer,
    labels: Int32[np.ndarray, " N"],
    *,
    batch_size: int,
    seed: int = 0,
    first: int = 0,
    **how,
) -> Iterator[tuple[UInt8[np.ndarray, "b H W 3"], Int32[np.ndarray, "b L"]]]:
    """Images 0..255 and tokens, in order; `first` is the index of the first one, `how` `sample`'s.

    The last batch is padded, so that one compiled program serves all.
    """
    size = round_up(batch_size)
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, min(start + batch_size, len(labels)))
        padded = np.resize(rows, size)
        keys = image_keys(seed, pin(jnp.asarray(first + padded), BATCH))
        wanted = pin(jnp.asarray(labels[padded]), BATCH)
        images, tokens = sample(transformer, tokenizer, wanted, keys, **how)
        yield to_bytes(images)[: len(rows)], np.asarray(tokens)[: len(rows)]


def to_bytes(images: jax.Array) -> UInt8[np.ndarray, "B H W 3"]:
    """[-1, 1] → 0..255, rounded."""
    return np.clip(np.rint((np.asarray(images) + 1) * 127.5), 0, 255).astype(np.uint8)
