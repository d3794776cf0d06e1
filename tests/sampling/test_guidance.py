"""Guidance: what each name makes of the logits with the class and without it."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn

from var_jax import BadInput
from var_jax.config import SamplingConfig, parse_guidance
from var_jax.sampling.guidance import guided, prior_matrix, spatial

COND, UNCOND = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 7)), jnp.float32)


@pytest.mark.parametrize(
    ("guidance", "strengths"),  # of four scales, with a guidance scale of 3
    [
        ("ramp", [0, 1, 2, 3]),
        ("ssg=0.5", [0, 1, 2, 3]),
        ("constant", [3, 3, 3, 3]),
        ("interval=2-3", [0, 3, 3, 0]),
        ("interval=4-4", [0, 0, 0, 3]),
    ],
)
def test_strength_of_each_scale(guidance, strengths):
    for k, t in enumerate(strengths):
        found = guided(guidance, COND, UNCOND, k, 4, 3.0)
        np.testing.assert_allclose(found, (1 + t) * COND - t * UNCOND, atol=1e-5)
    np.testing.assert_array_equal(guided(guidance, COND, None, 3, 4, None), COND)


def test_a_function_is_called_with_both_and_the_scale():
    found = guided(lambda cond, uncond, k: cond + k * uncond, COND, UNCOND, 2, 4, 3.0)
    np.testing.assert_array_equal(found, COND + 2 * UNCOND)


def test_the_prior_has_the_low_frequencies_of_the_coarser_scale_and_keeps_constants():
    """The others are of the interpolation, which on twice the side is known in closed form."""
    coarse = np.random.default_rng(1).normal(size=(3, 3))
    fine = (prior_matrix(3, 6) @ coarse.ravel()).reshape(6, 6)
    frequencies = dctn(fine, norm="ortho")
    np.testing.assert_allclose(frequencies[:3, :3], 2 * dctn(coarse, norm="ortho"), atol=1e-5)
    near, far = 0.75, 0.25
    rows = near * np.repeat(coarse, 2, 0) + far * coarse[[0, 1, 0, 2, 1, 2]]
    linear = near * np.repeat(rows, 2, 1) + far * rows[:, [0, 1, 0, 2, 1, 2]]
    wanted = dctn(linear, norm="ortho")
    for high in (np.s_[3:], np.s_[:, 3:]):
        np.testing.assert_allclose(frequencies[high], wanted[high], atol=1e-5)
    np.testing.assert_allclose(prior_matrix(3, 5).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(prior_matrix(1, 4), 1, atol=1e-6)
    np.testing.assert_allclose(prior_matrix(4, 4), np.eye(16), atol=1e-6)  # a side that comes again


def test_the_prior_of_oblong_scales():
    given = prior_matrix((2, 3), (4, 6)).reshape(4, 6, 2, 3)
    turned = prior_matrix((3, 2), (6, 4)).reshape(6, 4, 3, 2)
    np.testing.assert_allclose(given, turned.transpose(1, 0, 3, 2), atol=1e-6)
    np.testing.assert_allclose(given.sum((2, 3)), 1, atol=1e-5)


def test_ssg_moves_logits_away_from_the_prior():
    found = spatial(COND, COND[:, :1], 0.5, 1, 2)
    np.testing.assert_allclose(found, COND + 0.5 * (COND - COND[:, :1]), atol=1e-5)


@pytest.mark.parametrize("text", ["", "none", "ramp=2", "interval=3", "interval=0-2", "ssg=-1"])
def test_unknown_names(text):
    with pytest.raises(BadInput, match=r"guidance=.*; expected ramp, constant, interval=LO-HI"):
        parse_guidance(text)


def test_an_interval_beyond_the_scales():
    with pytest.raises(BadInput, match=r"guidance=interval=2-5; there are 4 scales"):
        SamplingConfig(guidance="interval=2-5").check((1, 2, 3, 4))
