"""How likely a model finds tokens: log p(tokens | class), exact, scale by scale (VAR eq. 4)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from var_jax.models.quantizer import Quantizer
from var_jax.models.var import Transformer, score_tokens
from var_jax.schedule import slices
from var_jax.sharding.ops import data_parallel
from var_jax.sharding.rows import in_batches


def log_likelihood(
    quantizer: Quantizer,
    transformer: Transformer,
    tokens: Int32[np.ndarray, "N L"],
    labels: Int32[np.ndarray, " N"],
    batch_size: int = 64,
) -> Float[np.ndarray, "N K"]:
    """log p in nats of the tokens of each of K scales, given the coarser ones and the class.

    Labels are 0..num_classes, the last meaning "no class". A row depends on its image alone, not on
    the batch. float64, so that sums over a set are exact.
    """
    rows = {"tokens": tokens, "labels": labels}
    found = in_batches(_by_scale, (quantizer, transformer), rows, batch_size)
    return found.astype(np.float64)


def class_log_likelihoods(
    quantizer: Quantizer,
    transformer: Transformer,
    tokens: Int32[np.ndarray, "N L"],
    batch_size: int = 64,
) -> Float[np.ndarray, "N C"]:
    """log p(tokens | class) in nats for each class; the argmax is a zero-shot classifier.

    Li et al., arXiv 2303.16203, do this with diffusion models, where p is only bounded.
    """
    each = lambda label: log_likelihood(
        quantizer, transformer, tokens, np.full(len(tokens), label, np.int32), batch_size
    )
    return np.stack([each(i).sum(1) for i in range(transformer.config.num_classes)], axis=1)


def class_scores(
    quantizer: Quantizer,
    transformer: Transformer,
    tokens: Int32[np.ndarray, "N L"],
    labels: Int32[np.ndarray, " N"],
    batch_size: int = 64,
) -> Float[np.ndarray, " N"]:
    """log p(tokens | class) − log p(tokens): by Bayes' rule log p(class | tokens) up to a constant.

    The second term is that of "no class", which guidance trains (Ho and Salimans, 2207.12598).
    """
    none = np.full_like(labels, transformer.config.num_classes)
    given, alone = (
        log_likelihood(quantizer, transformer, tokens, each, batch_size).sum(1)
        for each in (labels, none)
    )
    return given - alone


@jax.jit
def _by_scale(weights: tuple[Quantizer, Transformer], rows: Any) -> Float[Array, "B K"]:
    quantizer, transformer = weights
    inputs = data_parallel(Quantizer.teacher_forcing_inputs)(quantizer, rows["tokens"])
    target, total, _ = score_tokens(transformer(rows["labels"], inputs), rows["tokens"])
    found = target - total
    places = slices(transformer.config.patch_nums)
    return jnp.stack([found[:, place].sum(axis=1) for place in places], axis=1)
