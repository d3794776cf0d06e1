"""Coefficients come back from points with noise, within their intervals as often as claimed."""

import numpy as np
import pytest

from var_jax.evaluation.power_laws import (
    CONFIDENCE,
    PAPER,
    fit_power_law,
    fit_surface,
    frontier,
    interval,
    iso_flop,
    resample,
)

IRREDUCIBLE = {"loss_last": 4.5, "loss_all": 5.0, "error_last": 0.0, "error_all": 0.0}
GRIDS = {
    "even": np.geomspace(0.018, 2, 8),
    "off-centre": np.array([0.018, 0.03, 0.04, 0.05, 0.08, 0.12, 0.2, 2.0]),
    "two seeds": np.repeat(np.geomspace(0.018, 2, 6), [2, 2, 2, 1, 1, 1]),
}
NOISE = 0.005
SURFACE = (3.0, 50.0, 0.4, 30.0, 0.3)


def paper_law(metric):
    """E, A, α of a published equation."""
    beta, alpha = PAPER[metric]
    return IRREDUCIBLE[metric], beta**-alpha, alpha


def noisy(y, seed):
    return y * (1 + NOISE * np.random.default_rng(seed).normal(size=y.shape))


def inside(value, ends):
    low, high = ends
    return low - 1e-9 <= value <= high + 1e-9


@pytest.mark.parametrize("metric", PAPER)
def test_exact_points_give_back_the_law(metric):
    E, A, alpha = paper_law(metric)
    N = GRIDS["even"]
    fit = fit_power_law(N, E + A * N**-alpha)
    np.testing.assert_allclose(np.concatenate(fit), (E, A, alpha), rtol=2e-3, atol=2e-3)
    assert fit.beta[0] == pytest.approx(PAPER[metric][0], rel=0.02)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("metric", PAPER)
def test_intervals_cover_as_often_as_they_claim(metric, grid):
    truth, N = paper_law(metric), GRIDS[grid]
    E, A, alpha = truth
    covered, seeds = np.zeros(4), 30
    for seed in range(seeds):
        y = noisy(E + A * N**-alpha, seed)
        found = fit_power_law(N, y, resample(np.arange(len(N)), N, 200, seed))
        covered += [
            inside(x, interval(samples, len(N)))
            for x, samples in zip((*truth, PAPER[metric][0]), (*found, found.beta), strict=True)
        ]
    assert (covered >= CONFIDENCE * seeds).all(), covered / seeds


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("metric", PAPER)
def test_the_largest_run_is_within_the_interval_of_its_prediction(metric, grid):
    """The run that was not fitted, with its noise, and the law without noise."""
    (E, A, alpha), N = paper_law(metric), GRIDS[grid]
    law, runs = E + A * N**-alpha, np.arange(len(N) - 1)  # the largest comes last
    covered, seeds = np.zeros(2), 30
    for seed in range(seeds):
        y = noisy(law, seed)
        found = fit_power_law(N[:-1], y[:-1], resample(runs, N[:-1], 200, seed))
        ends = interval(found(N[-1:])[:, 0], len(runs))
        covered += inside(y[-1], ends), inside(law[-1], ends)
    assert (covered >= CONFIDENCE * seeds).all(), covered / seeds


def test_intervals_are_not_everything():
    E, A, alpha = paper_law("loss_last")
    N = np.geomspace(0.018, 2, 12)
    y = noisy(E + A * N**-alpha, 0)
    found = fit_power_law(N, y, resample(np.arange(12), N, 200))
    low, high = interval(found.alpha, 12)
    assert low > 0.02 and high < 1
    assert interval(found.alpha, 3) is None  # an exact fit leaves nothing to tell the noise from


def test_resamples_determine_a_law():
    sizes = np.array([1.0, 1.0, 2.0, 3.0])
    weights = resample(np.arange(4), sizes, 500)
    assert 0 < len(weights) < 500
    assert (weights.sum(axis=1) == 4).all()
    assert all(len(np.unique(sizes[row > 0])) == 3 for row in weights)


def test_points_of_a_run_stay_together():
    runs = np.repeat(np.arange(5), 3)
    weights = resample(runs, np.tile([1.0, 2.0, 3.0], 5), 20)
    assert (weights.reshape(-1, 5, 3).std(axis=2) == 0).all()


def test_frontier_is_what_no_cheaper_point_beats():
    rng = np.random.default_rng(0)
    compute, loss = rng.permutation(30).astype(float), rng.normal(size=30)
    weights = rng.integers(0, 2, (5, 30)).astype(float)
    for row, mask in zip(weights, frontier(compute, loss, weights), strict=True):
        there = row > 0
        beaten = [(loss[there & (compute < compute[i])] <= loss[i]).any() for i in range(30)]
        np.testing.assert_array_equal(mask, there & ~np.array(beaten))


def surface_points(N, D):
    """N, D and the loss of SURFACE at all pairs."""
    N, D = np.repeat(N, len(D)), np.tile(D, len(N))
    E, A, alpha, B, beta = SURFACE
    return N, D, E + A * N**-alpha + B * D**-beta


def test_the_surface_comes_back():
    N, D, loss = surface_points(np.geomspace(1e5, 1e7, 6), np.geomspace(1e4, 1e5, 6))
    fit = fit_surface(N, D, loss)
    np.testing.assert_allclose(np.concatenate(fit), SURFACE, rtol=2e-3)
    assert fit.growth[0] == pytest.approx(3 / 7, rel=2e-3)
    np.testing.assert_allclose(fit(N, D)[0], loss, rtol=1e-5)


def test_the_surface_comes_back_within_its_intervals():
    N, D, loss = surface_points(np.geomspace(1e5, 1e7, 8), np.geomspace(1e4, 1e5, 5))
    runs = np.repeat(np.arange(8), 5)
    found = fit_surface(N, D, noisy(loss, 1), resample(runs, N, 40))
    for truth, samples in zip(SURFACE, found, strict=True):
        low, high = interval(samples, 8, unknowns=5)
        assert low <= truth <= high


@pytest.mark.parametrize("shift, tolerance", [(1, 0.05), (30, None)])
def test_iso_flop_curves_and_off_centre_grids(shift, tolerance):
    """Parabolas find the best size of a centred grid; off centre they do not, the surface does."""
    E, A, alpha, B, beta = SURFACE
    budget = 1e12
    ratio = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    best = ratio * budget ** (beta / (alpha + beta))
    sizes = best * shift * np.geomspace(0.25, 4, 7) if shift == 1 else best * np.array([0.8, 8, 80])
    curves = {}
    for N in sizes:
        C = np.geomspace(budget / 3, budget * 3, 201)
        curves[float(N)] = C, E + A * N**-alpha + B * (C / N) ** -beta
    (found,) = iso_flop(curves, np.array([budget]))
    assert len(found.N) == len(sizes)
    if tolerance:
        assert found.best == pytest.approx(best, rel=tolerance)
        return
    assert abs(found.best / best - 1) > 0.1
    points = [(N, C[i] / N, L[i]) for N, (C, L) in curves.items() for i in range(0, 201, 40)]
    N, D, loss = np.array(points).T
    fit = fit_surface(N, D, loss)
    np.testing.assert_allclose(fit.growth, beta / (alpha + beta), rtol=0.01)


def test_budgets_that_fewer_than_three_sizes_reach_have_no_curve():
    line = np.array([1.0, 2.0]), np.array([3.0, 2.0])
    far = np.array([10.0, 20.0]), np.array([3.0, 2.0])
    assert not iso_flop({1.0: line, 2.0: line, 3.0: far}, np.array([1.5]))
