"""Scaling laws: loss and error as power laws of parameters, images and compute (VAR §5.2).

The irreducible loss is fitted with the rest: given the exponent, E and A of E + A·x^-α are a linear
least-squares problem with non-negative unknowns, so only the exponent is searched (variable
projection; Golub and Pereyra 1973). Errors are relative. Intervals come from a bootstrap over runs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize, nnls
from scipy.special import ndtr, stdtrit

FEWEST = 3  # sizes: a law has three unknowns
CONFIDENCE = 0.9
EXPONENTS = np.log(1e-3), np.log(3.0)  # the range that is searched
RESAMPLES, OF_SURFACE = 1000, 100

# Excess loss (β·N)^-α, N in billions of weights of the blocks, as (β, α): VAR §5.2.
PAPER = {
    "loss_last": (2.0, 0.23),
    "loss_all": (2.5, 0.20),
    "error_last": (490.0, 0.016),
    "error_all": (650.0, 0.010),
}
# The same of the least compute in PFLOPs: equations 13 to 16 of the NeurIPS proceedings.
PAPER_OF_COMPUTE = {
    "loss_last": (2.2e-5, 0.13),
    "loss_all": (1.5e-5, 0.16),
    "error_last": (0.081, 0.0067),
    "error_all": (0.044, 0.011),
}


class PowerLaw(NamedTuple):
    """y = E + A·x^-α; the fields hold a number for each resample."""

    E: Float[np.ndarray, " B"]
    A: Float[np.ndarray, " B"]
    alpha: Float[np.ndarray, " B"]

    def __call__(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, "B n"]:
        """The law at `x`."""
        return self.E[:, None] + self.A[:, None] * x ** -self.alpha[:, None]

    @property
    def beta(self) -> Float[np.ndarray, " B"]:
        """β of the form E + (β·x)^-α, which the paper uses; infinite where A is 0."""
        with np.errstate(divide="ignore", over="ignore"):
            return self.A ** (-1 / self.alpha)


class Surface(NamedTuple):
    """L = E + A·N^-α + B·D^-β (Hoffmann et al. 2022, eq. 2); a number for each resample."""

    E: Float[np.ndarray, " R"]
    A: Float[np.ndarray, " R"]
    alpha: Float[np.ndarray, " R"]
    B: Float[np.ndarray, " R"]
    beta: Float[np.ndarray, " R"]

    def __call__(
        self, N: Float[np.ndarray, " n"], D: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, "R n"]:
        """The loss of N parameters after D images."""
        column = lambda field: field[:, None]
        of_data = column(self.B) * D ** -column(self.beta)
        return column(self.E) + column(self.A) * N ** -column(self.alpha) + of_data

    @property
    def growth(self) -> Float[np.ndarray, " R"]:
        """a of N ∝ C^a at the least loss for compute C ∝ N·D."""
        return self.beta / (self.alpha + self.beta)


class IsoFlop(NamedTuple):
    """Losses of several sizes at one budget, and the vertex of the parabola through them."""

    budget: float
    N: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    parabola: Float[np.ndarray, " 3"]  # of the loss in log N, as numpy.polyval takes it
    best: float | None  # parameters; None where the vertex is not between the sizes


def fit_power_law(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "B n"] | None = None,
) -> PowerLaw:
    """The law of least squared relative error, for each row of weights.

    A grid of exponents is searched, then twice a finer one around its best.
    """
    weights = np.ones((1, len(x))) if weights is None else weights
    centre = np.exp(np.log(x).mean())
    (low, high), rows = EXPONENTS, np.arange(len(weights))
    middle, half = np.full(1, (low + high) / 2), (high - low) / 2
    E = A = middle
    for count in (65, 17, 17, 9):
        grid = np.clip(middle[:, None] + half * np.linspace(-1, 1, count), low, high)
        E, A, error = _linear_part(np.exp(grid), x / centre, y, weights)
        best = error.argmin(axis=1)
        middle = np.broadcast_to(grid, error.shape)[rows, best]
        E, A = E[rows, best], A[rows, best]
        half *= 2 / (count - 1)
    alpha = np.exp(middle)
    return PowerLaw(E, A * centre**alpha, alpha)


def _linear_part(
    alpha: Float[np.ndarray, "#B G"],
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "#B n"],
) -> tuple[Float[np.ndarray, "B G"], ...]:
    """Non-negative E and A of least error for given exponents, and that error.

    Two unknowns have a closed form: where one would be negative, the other alone is fitted.
    """
    power = x ** -alpha[..., None]
    of_y, v = (weights / y)[..., None], (weights / y**2)[..., None]
    s0, t0 = v.sum(axis=1), of_y.sum(axis=1)
    s1, s2, t1 = (power @ v)[..., 0], (power**2 @ v)[..., 0], (power @ of_y)[..., 0]
    determinant = np.maximum(s0 * s2 - s1**2, 1e-12 * s0 * s2)
    E, A = (s2 * t0 - s1 * t1) / determinant, (s0 * t1 - s1 * t0) / determinant
    E, A = np.where(E < 0, 0, E), np.where(E < 0, t1 / s2, A)
    E, A = np.where(A < 0, t0 / s0, E), np.where(A < 0, 0, A)
    residual = E[..., None] + A[..., None] * power - y
    return E, A, (residual**2 @ v)[..., 0]


def resample(
    runs: Int[np.ndarray, " n"], x: Float[np.ndarray, " n"], count: int, seed: int = 0
) -> Float[np.ndarray, "B n"]:
    """Weights of points for `count` resamples of runs; `runs` says of which run each point is.

    Resamples of fewer than three values of `x` determine no law and are left out.
    """
    names, runs = np.unique(runs, return_inverse=True)
    number, rng = len(names), np.random.default_rng(seed)
    weights = rng.multinomial(number, np.full(number, 1 / number), size=count)[:, runs]
    of_value = np.stack([weights[:, x == value].any(axis=1) for value in np.unique(x)])
    return weights[of_value.sum(axis=0) >= FEWEST].astype(float)


def interval(
    samples: Float[np.ndarray, " B"], runs: int, unknowns: int = 3
) -> tuple[float, float] | None:
    """An interval that covers the truth in at least 9 of 10 ladders; None without spare runs.

    The percentiles are those of 95 %, widened for few runs (Hesterberg 2015, "expanded
    percentile"). Nine of ten is what flat laws leave of that, as tests/evaluation measures.
    """
    spare = runs - unknowns
    if spare < 1 or not len(samples):
        return None
    tail = float(ndtr(-np.sqrt(runs / spare) * stdtrit(spare, 0.975)))
    low, high = np.quantile(samples, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


def frontier(
    compute: Float[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "B n"],
) -> Bool[np.ndarray, "B n"]:
    """Which points of a resample have a lower loss than all others of as little compute."""
    order = np.lexsort((loss, compute))
    found = np.where(weights[:, order] > 0, loss[order], np.inf)
    before = np.minimum.accumulate(found, axis=1)
    before = np.concatenate([np.full((len(found), 1), np.inf), before[:, :-1]], axis=1)
    mask = np.zeros(weights.shape, bool)
    mask[:, order] = found < before
    return mask


def iso_flop(
    curves: Mapping[float, tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]],
    budgets: Float[np.ndarray, " b"],
) -> list[IsoFlop]:
    """At each budget that three sizes reach, the loss of each size and the best size.

    `curves` has compute (rising) and loss of each size; between points, loss is linear in the
    logarithm of compute. Parabolas are biased where the sizes lie to one side of the best.
    """
    found = []
    for budget in map(float, budgets):
        inside = {N: c for N, c in curves.items() if c[0][0] <= budget <= c[0][-1]}
        if len(inside) < FEWEST:
            continue
        N = np.array(sorted(inside))
        loss = np.array([np.interp(np.log(budget), np.log(inside[n][0]), inside[n][1]) for n in N])
        found.append(parabola(budget, N, loss))
    return found


def parabola(budget: float, N: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> IsoFlop:
    """The losses of rising sizes at one budget, with their parabola in log N."""
    fit = np.polyfit(np.log(N), loss, 2)
    vertex = -fit[1] / (2 * fit[0]) if fit[0] > 0 else np.inf
    within = np.log(N[0]) <= vertex <= np.log(N[-1])
    return IsoFlop(budget, N, loss, fit, float(np.exp(vertex)) if within else None)


def fit_surface(
    N: Float[np.ndarray, " n"],
    D: Float[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "R n"] | None = None,
) -> Surface:
    """The surface of least squared relative error, for each row of weights.

    Two exponents are searched, on a grid and then by Nelder-Mead; E, A, B follow by non-negative
    least squares. Resamples start from the exponents of all points.
    """
    weights = np.ones((1, len(N))) if weights is None else weights
    centre = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    scaled = N / centre[0], D / centre[1]
    grid = np.linspace(*EXPONENTS, 24)
    everything = np.ones(len(N))
    start = min(
        (np.array([a, b]) for a in grid for b in grid),
        key=lambda logs: _surface_part(logs, *scaled, loss, everything)[1],
    )
    found = []
    for number, row in enumerate([everything, *weights]):
        error = lambda logs, row=row: _surface_part(logs, *scaled, loss, row)[1]
        best = minimize(error, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-12})
        start = best.x if number == 0 else start
        (E, A, B), _ = _surface_part(best.x, *scaled, loss, row)
        alpha, beta = np.exp(np.clip(best.x, *EXPONENTS))
        found.append((E, A * centre[0] ** alpha, alpha, B * centre[1] ** beta, beta))
    return Surface(*np.array(found[1:]).T)


def _surface_part(
    logs: Float[np.ndarray, " 2"],
    N: Float[np.ndarray, " n"],
    D: Float[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, " 3"], float]:
    """Non-negative E, A, B of least error for exponents given by their logarithms, and its root."""
    alpha, beta = np.exp(np.clip(logs, *EXPONENTS))
    scale = np.sqrt(weights) / loss
    columns = np.stack([np.ones(len(N)), N**-alpha, D**-beta], axis=1) * scale[:, None]
    return nnls(columns, loss * scale)
