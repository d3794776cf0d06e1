"""Rejection sampling: draw more images than wanted and keep those that a score likes best.

The paper's strongest figures are of samples that a classifier accepts (VAR §5, table 1, "-re"). A
score is any function (images uint8 (N,H,W,3), labels (N,)) → (N,), higher is better. Because an
image is a function of seed and index, only scores need be kept, and the chosen are drawn again:

    index = candidates(labels, keep)
    scores = [score(images, ...) for images, _ in generate(..., index=index)]
    chosen = index[best(scores, labels[index % len(labels)], labels)]
"""

import math

import numpy as np
from jaxtyping import Float, Int32


def candidates(labels: Int32[np.ndarray, " N"], keep: float) -> Int32[np.ndarray, " M"]:
    """Which images to draw so that of each class the best `keep`, in (0, 1], are the wanted ones.

    They are named by index; the class of image i is labels[i % N], so the first N are those that
    would be drawn without rejection.
    """
    repeated = np.tile(labels, math.ceil(1 / keep))
    wanted = np.ceil(np.bincount(labels) / keep - 1e-6)
    return np.flatnonzero(_rank(repeated) < wanted[repeated]).astype(np.int32)


def best(
    scores: Float[np.ndarray, " M"],
    scored: Int32[np.ndarray, " M"],
    labels: Int32[np.ndarray, " N"],
) -> Int32[np.ndarray, " N"]:
    """For each wanted label the position of its image: of each class the best, in their order.

    `scored` are the labels of the candidates. Equal scores: the first ones.
    """
    order = np.lexsort((-scores, scored))  # by class, best first
    accepted = _rank(scored[order]) < np.bincount(labels, minlength=scored.max() + 1)[scored[order]]
    positions = np.sort(order[accepted])
    chosen = np.empty(len(labels), np.int32)
    chosen[np.argsort(labels, kind="stable")] = positions[
        np.argsort(scored[positions], kind="stable")
    ]
    return chosen


def _rank(values: Int32[np.ndarray, " N"]) -> Int32[np.ndarray, " N"]:
    """How often the same value came before."""
    order = np.argsort(values, kind="stable")
    first = np.searchsorted(values[order], values[order])
    rank = np.empty(len(values), np.int32)
    rank[order] = np.arange(len(values)) - first
    return rank
