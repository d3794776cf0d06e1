"""Figures that tell copies and monotony from new pictures."""

import numpy as np
import pytest

from var_jax.evaluation.report import nearest_distance, variety


def flat(*levels):
    """Images of one grey each, 0 to 255."""
    return np.array(levels, np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


def test_distance_to_the_nearest():
    near = nearest_distance(flat(0, 100, 255), flat(10, 90, 255))
    np.testing.assert_allclose(near, np.array([10, 10, 0]) / 255, atol=1e-4)


def test_variety_is_within_a_class():
    labels = np.array([0, 1, 0, 1, 2])
    between = variety(flat(0, 7, 51, 7, 255), labels)  # 51, 0, and a class of one image
    assert between == pytest.approx(0.5 * 51 / 255, abs=1e-4)
    assert variety(flat(0, 255), np.array([0, 1])) == 0
