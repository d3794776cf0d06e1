"""Scores of sets of images from their features, and of pairs of images from their pixels.

Distances between sets of 50,000 and 10,000 images are taken tile by tile: under 4 GB.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from var_jax import BadInput
from var_jax.evaluation.statistics import check_features
from var_jax.sharding.mesh import alone

TILE = 10_000  # images a side, as the ADM evaluator's, which decides on float16 tile by tile
ROWS = 1_000  # of a tile at a time
NEIGHBOUR = 3  # whose distance is the radius of an image's ball
BLOCK = 5_000  # images of one Inception score, as by the ADM evaluator
PAIRS = 32  # images of a set whose pixels are compared at a time
HIGHEST = jax.lax.Precision.HIGHEST


def inception_score(
    logits: Float[np.ndarray, "N C"], splits: int | None = None, block: int = BLOCK
) -> tuple[float, float]:
    """Mean and deviation, over parts in file order, of exp(mean KL(p(class | image) | p(class))).

    Parts are blocks of 5,000 images as by the ADM evaluator, the last maybe shorter, or as many
    equal `splits` (Salimans et al., arXiv 1606.03498).

    Raises: BadInput if there are fewer images than parts, or a value is not finite.
    """
    logits = check_features(logits, "logits", at_least=max(splits or 2, 2))
    N, scores = len(logits), []
    cuts = range(0, N, block) if splits is None else [i * N // splits for i in range(splits)]
    for part in np.split(logits, list(cuts)[1:]):
        part = part.astype(np.float64) - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        # A class of probability zero is one of every image: it adds nothing.
        log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M E"]) -> float:
    """The squared maximum mean discrepancy, unbiased, by (x·y/D + 1)³ over all pairs (KID).

    Bińkowski et al., arXiv 1801.01401. It may be below zero, where the sets are alike.

    Raises: BadInput if a set has fewer than two images, sizes differ, or a value is not finite.
    """
    a, b = (x.astype(np.float64) for x in pair_of_sets(a, b))

    def total(x: np.ndarray, y: np.ndarray) -> float:
        parts = (x[i : i + ROWS] @ y.T for i in range(0, len(x), ROWS))
        return sum(float(((part / x.shape[1] + 1) ** 3).sum()) for part in parts)

    def within(x: np.ndarray) -> float:
        same = ((x**2).sum(1) / x.shape[1] + 1) ** 3
        return (total(x, x) - float(same.sum())) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


@alone()
def precision_recall(
    samples: Float[np.ndarray, "N D"], reference: Float[np.ndarray, "M E"], adm: bool = False
) -> tuple[float, float]:
    """Shares of samples near the reference, and of the reference near samples, both in [0, 1].

    Near is within the ball of an image, as wide as the distance of its third neighbour
    (Kynkäänniemi et al., arXiv 1904.06991). Squared distances are float32, or with `adm` float16
    as those of the ADM evaluator, which published figures have: rounding moves them.

    Raises: BadInput if a set has fewer than four images, sizes differ, or a value is not finite.
    """
    a, b = pair_of_sets(samples, reference, at_least=NEIGHBOUR + 1)
    radii_a, radii_b = radii(a, adm), radii(b, adm)
    in_b, in_a = np.zeros(len(a), bool), np.zeros(len(b), bool)
    for i, x in tiles(a):
        for j, y in tiles(b):
            half = adm and fits_half(x, y)
            for row in range(0, len(x), ROWS):
                distance = np.asarray(squared_distances(x[row : row + ROWS], y, half))
                rows = slice(i + row, i + row + len(distance))
                columns = slice(j, j + len(y))
                in_b[rows] |= (distance <= radii_b[columns]).any(1)
                in_a[columns] |= (distance <= radii_a[rows, None]).any(0)
    return float(in_b.mean()), float(in_a.mean())


def radii(x: Float[np.ndarray, "N D"], adm: bool) -> Float[np.ndarray, " N"]:
    """The squared distance of each image's third neighbour, itself not counted."""
    nearest = np.full((len(x), NEIGHBOUR + 1), np.inf, np.float32)
    for i, a in tiles(x):
        for _, b in tiles(x):
            half = adm and fits_half(a, b)
            for row in range(0, len(a), ROWS):
                distance = np.asarray(squared_distances(a[row : row + ROWS], b, half))
                rows = slice(i + row, i + row + len(distance))
                both = np.concatenate([nearest[rows], distance], axis=1)
                nearest[rows] = np.partition(both, NEIGHBOUR, axis=1)[:, : NEIGHBOUR + 1]
    return nearest.max(1)


def tiles(x: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Where each tile starts, and it."""
    return [(i, x[i : i + TILE]) for i in range(0, len(x), TILE)]


@functools.partial(jax.jit, static_argnames="half")
def squared_distances(
    x: Float[Array | np.ndarray, "n D"], y: Float[Array | np.ndarray, "m D"], half: bool = False
) -> Float[Array, "n m"]:
    """Of all pairs, in float32; with `half` each term and sum is rounded to float16."""
    # XLA leaves out casts there and back, but not this.
    rounded = lambda z: jax.lax.reduce_precision(z, 5, 10) if half else z
    x, y = rounded(jnp.asarray(x)), rounded(jnp.asarray(y))
    of_x, of_y = (rounded((rounded(z**2)).sum(1)) for z in (x, y))
    product = rounded(jnp.matmul(x, y.T, precision=HIGHEST))
    return jnp.maximum(rounded(rounded(of_x[:, None] - 2 * product) + of_y[None]), 0)


def fits_half(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether all squared distances of a tile are finite in float16."""
    longest = sum(float((z.astype(np.float64) ** 2).sum(1).max()) ** 0.5 for z in (x, y))
    if longest**2 < 0.99 * float(
        np.finfo(np.float16).max
    ):  # none is longer than both vectors in a row
        return True
    rows = range(0, len(x), ROWS)
    return all(bool(jnp.isfinite(squared_distances(x[i : i + ROWS], y, True)).all()) for i in rows)


def pair_of_sets(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M E"], at_least: int = 2
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "M E"]]:
    """Two sets of features in float32. Raises: BadInput if they cannot be compared."""
    a, b = check_features(a, "samples", at_least), check_features(b, "reference", at_least)
    if a.shape[1:] != b.shape[1:]:
        raise BadInput(
            f"samples have {a.shape[1]} features, the reference {b.shape[1]}; expected those of"
            " one network."
        )
    return a.astype(np.float32), b.astype(np.float32)


def psnr(
    a: UInt8[np.ndarray, "N H W 3"], b: UInt8[np.ndarray, "M h w 3"]
) -> Float[np.ndarray, " N"]:
    """The peak signal-to-noise ratio of each pair of images, in dB; infinite for equal ones."""
    pair_of_images(a, b)
    error = lambda a, b: ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / in_parts(error, a, b))


@jax.jit
def _ssim(a: Float[Array, "N H W 3"], b: Float[Array, "N H W 3"]) -> Float[Array, " N"]:
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def blur(x: Array) -> Array:
        for axis in (1, 2):
            inside = x.shape[axis] - len(window) + 1
            shifts = [jax.lax.slice_in_dim(x, i, i + inside, axis=axis) for i in range(len(window))]
            x = jnp.einsum("sNHWC,s->NHWC", jnp.stack(shifts), jnp.float32(window))
        return x

    mean_a, mean_b = blur(a), blur(b)
    # About the means of windows; about 0 float32 would lose half of the digits.
    aa, bb, ab = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    light, contrast = 0.01**2, 0.03**2
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    top = (2 * mean_a * mean_b + light) * (2 * ab + contrast)
    bottom = (mean_a**2 + mean_b**2 + light) * (aa + bb + contrast)
    return (top / bottom).mean((1, 2, 3))


@alone()
def ssim(
    a: UInt8[np.ndarray, "N H W 3"], b: UInt8[np.ndarray, "M h w 3"]
) -> Float[np.ndarray, " N"]:
    """The structural similarity of each pair of images, at most 1.

    Wang et al. 2004: Gaussian windows of 11 pixels (sigma 1.5) inside the image, each colour alone.

    Raises: BadInput for images smaller than a window, or of two sizes.
    """
    pair_of_images(a, b, smallest=11)
    centred = lambda x: jnp.asarray(x, jnp.float32) / 255 - 0.5
    return in_parts(lambda a, b: np.asarray(_ssim(centred(a), centred(b))), a, b)


def in_parts(measure: Callable[[Any, Any], np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What is measured of pairs of images, of few at a time: it takes many times their memory."""
    starts = range(0, len(a), PAIRS)
    return np.concatenate([measure(a[i : i + PAIRS], b[i : i + PAIRS]) for i in starts])


def pair_of_images(a: np.ndarray, b: np.ndarray, smallest: int = 1) -> None:
    """Raises: BadInput unless both are as many images of one size."""
    if a.shape != b.shape or not len(a):
        raise BadInput(
            f"images of shape {a.shape} and {b.shape} are no pairs; expected equal ones."
        )
    if min(a.shape[1:3]) < smallest:
        H, W = a.shape[1:3]
        raise BadInput(f"images have {H} by {W} pixels; SSIM takes {smallest} a side or more.")
