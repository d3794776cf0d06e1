"""Mean and covariance of features that arrive batch by batch, in float64 on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from var_jax import BadInput


class Moments(NamedTuple):
    """Count, mean, and sum of the products of deviations from it. Parts add up, in any order.

    All three are arrays, so that they can be stored; Chan et al. 1979 has the sum, which does not
    cancel where the mean is large.
    """

    count: np.ndarray
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"]) -> "Moments":
        """The moments of a batch.

        Raises: BadInput if it holds NaN or infinity.
        """
        features = check_features(features, "features", at_least=0).astype(np.float64)
        D = features.shape[1]
        mean = features.mean(0) if len(features) else np.zeros(D)
        centred = features - mean
        return cls(np.array(len(features)), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        """The moments of both parts together. Raises: BadInput if they have other sizes."""
        if self.mean.shape != other.mean.shape:
            raise BadInput(
                f"features of {self.mean.size} and of {other.mean.size} numbers an image do not"
                " belong together; expected those of one network."
            )
        count, step = self.count + other.count, other.mean - self.mean
        share = other.count / np.maximum(count, 1)
        between = np.outer(step, step) * (self.count * share)
        return Moments(
            np.array(count), self.mean + step * share, self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The unbiased one, as `np.cov`. Raises: BadInput for fewer than two images."""
        if self.count < 2:
            raise BadInput(f"a covariance takes at least 2 images, found {self.count}.")
        return self.scatter / (self.count - 1)


def check_features(
    features: Float[np.ndarray, "N D"], what: str, at_least: int = 2
) -> Float[np.ndarray, "N D"]:
    """Features as an array. Raises: BadInput if there are too few, or one is not finite."""
    features = np.asarray(features)
    if len(features) < at_least:
        raise BadInput(f"{what}: {len(features)} images; expected at least {at_least}.")
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise BadInput(
            f"{what}: image {int(bad.argmax())} has values that are not finite ({bad.sum()} of"
            f" {len(features)} do)."
        )
    return features
