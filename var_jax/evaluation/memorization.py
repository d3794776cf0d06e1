"""Whether a model repeats its training images: loss on them, and how near samples come to them.

Images are compared in the pooled features of a network, Euclidean. Samples that are as far from the
nearest training image as validation images are, are new; those far nearer are near-copies.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from var_jax.data.sources import Source
from var_jax.evaluation.features import Features, Network, extract
from var_jax.evaluation.image_sets import ImageSet, SourceImages
from var_jax.evaluation.scores import ROWS, squared_distances
from var_jax.evaluation.tokenizer import Reconstructions
from var_jax.models.tokenizer import Tokenizer
from var_jax.sharding.mesh import alone
from var_jax.tools.images import PAPER, labelled_rows

NEIGHBOURS = 5  # of an image that are shown
SHOWN = 16  # samples in it, those with the nearest neighbours
QUANTILES = (0.01, 0.1, 0.5, 0.9)
CLOSE = 0.01  # quantile of validation images: up to its distance an image is a near-copy


class Neighbours(NamedTuple):
    """The nearest training images of each image of a set, the first the nearest."""

    distance: Float[np.ndarray, "N k"]
    index: Int[np.ndarray, "N k"]


@alone()
def nearest(found: Features, training: Features, count: int = NEIGHBOURS) -> Neighbours:
    """The `count` nearest of `training`, of which memory holds one part of features."""
    rows = found.rows("pool")
    count = min(count, training.count)
    distance = np.full((len(rows), count), np.inf, np.float32)
    index, start = np.zeros((len(rows), count), int), 0
    for part in training.parts("pool"):
        for i in range(0, len(rows), ROWS):
            here = slice(i, i + ROWS)
            near, which = nearest_in_part(rows[here], part, count)
            both = np.concatenate([distance[here], near], axis=1)
            places = np.concatenate([index[here], start + which], axis=1)
            order = np.argsort(both, axis=1, kind="stable")[:, :count]
            distance[here] = np.take_along_axis(both, order, 1)
            index[here] = np.take_along_axis(places, order, 1)
        start += len(part)
    return Neighbours(distance, index)


def nearest_in_part(
    rows: Float[np.ndarray, "n D"], part: Float[np.ndarray, "m D"], count: int
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """Distances and places of the nearest, in any order.

    Found by squared distances that cancel where images are equal, so those of the nearest are
    computed again from differences.
    """
    count = min(count, len(part))
    squared = np.asarray(squared_distances(rows, part))
    which = np.argpartition(squared, count - 1, axis=1)[:, :count]
    return np.linalg.norm(rows[:, None] - part[which], axis=2), which


def compare_with_training(
    network: Network,
    samples: ImageSet,
    sources: Mapping[str, Source],
    folder: epath.Path,
    batch_size: int = 64,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Neighbours] | None:
    """The nearest images of `sources["train"]` to each of the samples and of the validation images.

    With a tokenizer those of `sources` are as it reconstructs them, as samples are: then a copy is
    at distance zero, and no set has errors of the tokenizer that another lacks. None on processes
    above 0.
    """
    sets: dict[str, ImageSet] = {"samples": samples}
    for split, source in sources.items():
        sets[split] = SourceImages(source)
        if tokenizer is not None:
            sets[split] = Reconstructions(tokenizer, sets[split], batch_size)
    found = {name: extract(network, each, folder, batch_size, name) for name, each in sets.items()}
    if jax.process_index() > 0:
        return None
    return {name: nearest(found[name], found["train"]) for name in ("samples", "validation")}


def distance_figures(samples: Neighbours, validation: Neighbours) -> dict[str, dict[str, float]]:
    """Of both sets: the share of near-copies, images as near to a training image as one in a
    hundred of the validation set, and quantiles of the distance to the nearest training image."""
    limit = np.quantile(validation.distance[:, 0], CLOSE)
    found = {}
    for name, each in {"samples": samples, "validation": validation}.items():
        first = each.distance[:, 0]
        found[name] = {"images": len(first), "near_copies": float((first <= limit).mean())}
        for q in QUANTILES:
            found[name][f"nearest_distance_q{round(100 * q):02}"] = float(np.quantile(first, q))
    return found


def neighbours_of(
    samples: ImageSet, found: Neighbours, training: Source
) -> UInt8[np.ndarray, "H W 3"]:
    """An image with a row for each of the samples that are nearest to a training image, the nearest
    first; in it the distance, the sample, and its nearest training images."""
    order = [int(i) for i in np.argsort(found.distance[:, 0], kind="stable")[:SHOWN]]
    chosen, start = {}, 0
    for batch in samples.batches(ROWS):
        chosen |= {i: batch[i - start] for i in order if start <= i < start + len(batch)}
        start += len(batch)
    rows = {}
    for rank, i in enumerate(order, 1):
        near = [training[int(j)]["image"] for j in found.index[i]]
        gap = np.full_like(chosen[i], PAPER)
        rows[f"{rank}: {found.distance[i, 0]:.2f}"] = np.stack([chosen[i], gap, *near])
    return labelled_rows(rows, scale=max(1, 64 // len(gap)))
