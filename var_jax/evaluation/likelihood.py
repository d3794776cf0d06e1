"""How likely a model finds tokens: log p(tokens | class), exact, scale by scale (VAR eq. 6)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, Int32

from var_jax.data.sources import Source
from var_jax.evaluation.image_sets import spread
from var_jax.evaluation.parts import in_parts
from var_jax.evaluation.reading import in_order
from var_jax.models.backbone import Backbone
from var_jax.models.quantizer import Quantizer
from var_jax.models.tokenizer import Tokenizer, encode_images
from var_jax.models.var import score_tokens
from var_jax.schedule import lengths, slices
from var_jax.sharding.rows import in_batches
from var_jax.tools.logs import progress
from var_jax.tools.npz import load_npz

PART = 256  # images in memory, and of a file


def log_likelihood(
    quantizer: Quantizer,
    transformer: Backbone,
    tokens: Int32[np.ndarray, "N L"],
    labels: Int32[np.ndarray, " N"],
    batch_size: int = 64,
) -> Float[np.ndarray, "N K"]:
    """log p in nats of the tokens of each of K scales, given the coarser ones and the class.

    Labels are 0..num_classes, the last meaning "no class". A row depends on its image alone, not on
    the batch. float64, so that sums over a set are exact.
    """
    rows = {"tokens": tokens, "labels": labels}
    found, _ = in_batches(_by_scale, (quantizer, transformer), rows, batch_size)
    return found.astype(np.float64)


def class_log_likelihoods(
    quantizer: Quantizer,
    transformer: Backbone,
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
    transformer: Backbone,
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


def likelihood_figures(
    tokenizer: Tokenizer,
    transformer: Backbone,
    source: Source,
    folder: epath.Path,
    batch_size: int = 64,
    count: int | None = None,
) -> dict[str, float]:
    """What a set costs: nats a token, bits an image and accuracy, of all scales and of each.

    Of all its images, or of `count` that are evenly spread. Labels are never dropped; no image
    counts twice, whatever the batch size, but where it stands in for one that cannot be read. What
    is done is kept in `folder`, which is of these models alone; on process 0.
    """
    patch_nums, chosen = transformer.config.patch_nums, spread(len(source), count)
    with progress(len(chosen), 0, "likelihood") as bar:

        def run(part):
            tokens = in_batches(encode_images, tokenizer, part["image"], batch_size)
            weights = tokenizer.quantizer, transformer
            rows = {"tokens": tokens, "labels": part["label"]}
            found, hits = in_batches(_by_scale, weights, rows, batch_size, bar.update)
            return {"log_likelihood": found, "hits": hits}

        paths = in_parts(folder / "likelihood", in_order(source, PART, chosen), run, bar.update)
    if jax.process_index() > 0:
        return {}
    total = lambda name: np.sum(
        [load_npz(path, name)[name].sum(0, dtype=np.float64) for path in paths], axis=0
    )
    cost, right = -total("log_likelihood"), total("hits")
    length, bits = len(chosen) * np.array(lengths(patch_nums)), cost / np.log(2) / len(chosen)
    figures = {"loss": cost.sum() / length.sum(), "accuracy": right.sum() / length.sum()}
    figures["bits_per_image"] = bits.sum()
    for k in range(len(patch_nums)):
        each = {"loss": cost[k] / length[k], "accuracy": right[k] / length[k], "bits": bits[k]}
        figures |= {f"{name}_scale{k + 1}": value for name, value in each.items()}
    return {name: float(value) for name, value in figures.items()}


def classification_figures(
    tokenizer: Tokenizer,
    transformer: Backbone,
    source: Source,
    folder: epath.Path,
    batch_size: int = 64,
    count: int | None = None,
) -> dict[str, float]:
    """How often the class of an image is the likeliest one, or among the five likeliest.

    A class that is as likely as others comes after them. Of all images, or of `count` that are
    evenly spread. What is done is kept in `folder`, which is of these models alone; on process 0.
    """
    chosen, quantizer = spread(len(source), count), tokenizer.quantizer
    with progress(len(chosen), 0, "classifying") as bar:

        def run(part):
            tokens = in_batches(encode_images, tokenizer, part["image"], batch_size)
            each = class_log_likelihoods(quantizer, transformer, tokens, batch_size)
            bar.update(len(tokens))
            return {"log_likelihood": each, "label": part["label"]}

        batches = in_order(source, batch_size, chosen)
        paths = in_parts(folder / "classes", batches, run, bar.update)
    if jax.process_index() > 0:
        return {}
    rank = np.concatenate([rank_of_label(**load_npz(path)) for path in paths])
    top = {"accuracy": 1, "accuracy_top5": 5}
    return {f"zero_shot_{name}": float(np.mean(rank <= most)) for name, most in top.items()}


def rank_of_label(
    log_likelihood: Float[np.ndarray, "N C"], label: Int32[np.ndarray, " N"]
) -> Int[np.ndarray, " N"]:
    """The place of the class of each image among all classes, 1 the likeliest; of NaN the last."""
    less = log_likelihood < np.take_along_axis(log_likelihood, label[:, None], 1)
    return (~less).sum(1)


@jax.jit
def _by_scale(
    weights: tuple[Quantizer, Any], rows: Any
) -> tuple[Float[Array, "B K"], Int32[Array, "B K"]]:
    """log p in nats, and how many tokens are the likeliest ones."""
    quantizer, transformer = weights
    inputs = transformer.inputs(quantizer, rows["tokens"])
    target, total, right = score_tokens(transformer(rows["labels"], inputs), rows["tokens"])
    places = slices(transformer.config.patch_nums)
    by_scale = lambda x: jnp.stack([x[:, place].sum(axis=1) for place in places], axis=1)
    return by_scale(target - total), by_scale(right.astype(jnp.int32))
