"""Guidance: how the logits of a scale come from those with the class and those without it.

`SamplingConfig.guidance` chooses by name. A function (cond, uncond, k) → logits may stand in its
place: logits (B,l,V), k from 0; `uncond` is None where there is no guidance scale. A new function
is a new program.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.fft import dct

from var_jax.config import parse_guidance
from var_jax.schedule import Size, shape_of
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import reshard

Logits = Float[Array, "B l V"]
Guidance = str | Callable[[Logits, Logits | None, int], Logits]


def guided(
    guidance: Guidance,
    cond: Logits,
    uncond: Logits | None,
    k: int,
    num_scales: int,
    cfg: Float[Array, ""] | float | None,
) -> Logits:
    """The logits of scale k under classifier-free guidance, whose scale is all of `cfg` or less."""
    if not isinstance(guidance, str):  # which may want the vocabulary whole on each device
        return guidance(*reshard((cond, uncond), BATCH), k)
    if uncond is None or cfg is None:
        return cond
    name, numbers = parse_guidance(guidance)
    share = k / max(num_scales - 1, 1)
    if name == "constant":
        share = 1.0
    if name == "interval":
        share = float(numbers[0] <= k + 1 <= numbers[1])
    return guide(cond, uncond, cfg * share)


def guided_scales(guidance: Guidance, num_scales: int) -> int:
    """How many scales, from the first on, there are up to the last that is guided."""
    if isinstance(guidance, str) and (numbers := parse_guidance(guidance)[1])[1:]:
        return int(numbers[1])
    return num_scales


def guide(
    cond: Float[Array, "B *rest"],
    uncond: Float[Array, "B *rest"],
    strength: Float[Array, ""] | float,
) -> Float[Array, "B *rest"]:
    """Classifier-free guidance: (1+t)·cond − t·uncond (arXiv 2207.12598, eq. 6)."""
    return (1 + strength) * cond - strength * uncond


def spatial_strength(guidance: Guidance) -> float:
    """BETA of Scaled Spatial Guidance; 0 without it."""
    if not isinstance(guidance, str):
        return 0.0
    name, numbers = parse_guidance(guidance)
    return numbers[0] if name == "ssg" else 0.0


def spatial(
    logits: Logits, coarser: Float[Array, "B m V"], strength: float, given: Size, wanted: Size
) -> Float[Array, "B l V"]:
    """Scaled Spatial Guidance: ℓ + β·(ℓ − prior), the prior made of the scale before.

    `given` is the size of the scale before, `wanted` of this one. arXiv 2602.05534, eq. 8. The
    first scale has no prior. β is the same at all scales; the paper has one for each.
    """
    matrix, highest = prior_matrix(given, wanted), jax.lax.Precision.HIGHEST
    prior = jnp.einsum("lm,BmV->BlV", matrix, coarser, precision=highest)
    return logits + strength * (logits - prior)


@functools.cache
def prior_matrix(size_in: Size, size_out: Size) -> Float[np.ndarray, "l m"]:
    """Discrete Spatial Enhancement (arXiv 2602.05534, alg. 1) from a scale of tokens to a finer.

    The finer one is interpolated linearly; then its low frequencies, those that the coarser one
    has, are replaced by the coarser one's. All of it is linear, and one matrix.
    """
    axes = map(_along_an_axis, shape_of(size_in), shape_of(size_out))
    interpolate, low, coarse = (np.kron(y, x) for y, x in zip(*axes, strict=True))
    return (coarse + (interpolate - low)).astype(np.float32)


def _along_an_axis(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (m,n): to interpolate, and of that the low frequencies; those of the coarser one.

    Frequencies are of the orthonormal DCT-II, whose coefficients grow with the side: scaled, so
    that a constant stays what it is.
    """
    basis = lambda n: np.asarray(dct(np.eye(n), axis=0, norm="ortho"))
    centres = (np.arange(m) + 0.5) * n / m - 0.5
    interpolate = np.stack([np.interp(centres, np.arange(n), e) for e in np.eye(n)], 1)
    low = basis(m)[:n]
    return interpolate, low.T @ low @ interpolate, low.T @ basis(n) * (m / n) ** 0.5
