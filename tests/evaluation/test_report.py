"""Figures that tell copies and monotony from new pictures."""

import numpy as np
import pytest

from var_jax.evaluation.report import nearest_distance, report, variety


class Pictures:
    """A source in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.class_names = tuple("abc")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


def flat(*levels):
    """Images of one grey each, 0 to 255."""
    return np.array(levels, np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


def test_distance_to_the_nearest():
    near = nearest_distance(flat(0, 100, 255), flat(10, 90, 255))
    np.testing.assert_allclose(near, np.array([10, 10, 0]) / 255, atol=1e-4)


def test_variety_is_within_a_class():
    images, labels = flat(0, 7, 51, 7, 255), np.array([0, 1, 0, 1, 2])  # 51 apart, 0, and one alone
    assert variety(images, labels, np.array([0, 1])) == pytest.approx(0.5 * 51 / 255, abs=1e-4)


@pytest.mark.parametrize("held_out, told", [([0, 0, 1], True), ([0, 1, 2], False)])
def test_variety_is_told_where_held_out_pictures_have_company(held_out, told):
    items = lambda labels: Pictures(flat(*range(0, 40 * len(labels), 40)), np.array(labels))
    report_ = report(items([0, 0, 1, 1, 2, 2]), items(held_out), lambda labels: flat(*labels))
    assert ("distance within a class, real" in report_) == told
    assert report_.get("distance within a class, samples", 0) == 0  # both of class 0 are the same


def test_copies_are_nearer_than_a_reconstruction_and_may_be_mirrored():
    known = np.zeros((2, 4, 4, 3), np.uint8)
    known[0, :, 0], known[1, 0] = 255, 255  # a bar at the left, one at the top
    held_out = np.zeros((1, 4, 4, 3), np.uint8)  # half of the way, RMS, to either
    made = np.stack([known[0, :, ::-1], held_out[0]])  # the bar at the right, and nothing
    train, validation = Pictures(known, np.array([0, 0])), Pictures(held_out, np.array([0]))
    found = report(train, validation, lambda labels: made, psnr=20.0)  # RMS of 0.1
    assert (found["copies, real"], found["copies, samples"]) == (0.0, 0.5)
    assert found["distance to training, samples"] == pytest.approx(0.25)  # the median of 0 and 0.5
    assert "copies, real" not in report(train, validation, lambda labels: made)
