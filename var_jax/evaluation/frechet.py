"""The Fréchet distance of two normal distributions: FID, sFID and their kin (arXiv 1706.08500)."""

import numpy as np
from jaxtyping import Float

from var_jax import BadInput


def frechet(
    mean_a: Float[np.ndarray, " D"],
    covariance_a: Float[np.ndarray, "D D"],
    mean_b: Float[np.ndarray, " E"],
    covariance_b: Float[np.ndarray, "E E"],
) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½), in float64.

    The last trace is the sum of the singular values of A^½ B^½. Those are exact to rounding also
    where covariances are singular; roots of eigenvalues near zero are not.

    Raises: BadInput if the sizes differ, or a value is not finite.
    """
    arrays = mean_a, covariance_a, mean_b, covariance_b
    if mean_a.shape != mean_b.shape:
        raise BadInput(
            f"features of {mean_a.size} and of {mean_b.size} numbers an image cannot be compared;"
            " expected statistics of one network."
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise BadInput("statistics hold values that are not finite.")
    step = mean_a.astype(np.float64) - mean_b
    overlap = np.linalg.svd(root(covariance_a) @ root(covariance_b), compute_uv=False).sum()
    distance = step @ step + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(distance), 0.0)  # below zero by rounding


def root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """The symmetric square root; eigenvalues that rounding may have made are taken for zeros."""
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    noise = len(values) * np.finfo(np.float64).eps * values[-1]
    return (vectors * np.sqrt(np.where(values > noise, values, 0))) @ vectors.T
