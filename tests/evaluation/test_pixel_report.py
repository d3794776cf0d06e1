"""Figures that tell copies and monotony from new pictures."""

import numpy as np
import pytest

from var_jax.evaluation.pixel_report import nearest_distance, report, variety


class Pictures:
    """A source in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.class_names = tuple("abc")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


def same(images):
    """A tokenizer without error."""
    return images


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
    report_ = report(items([0, 0, 1, 1, 2, 2]), items(held_out), lambda labels: flat(*labels), same)
    assert ("distance within a class, real" in report_) == told
    if told:  # both of class 0 are the same
        assert report_["distance within a class, samples"] == 0


def test_copies_may_be_mirrored():
    """A training picture is a bar at the left, one of the samples the same at the right."""
    known = np.zeros((1, 4, 4, 3), np.uint8)
    known[0, :, 0] = 255
    blank = np.zeros_like(known)  # a quarter of the pixels is off by 1: RMS of 0.5
    train, validation = Pictures(known, np.array([0])), Pictures(blank, np.array([0]))
    made = lambda labels: np.concatenate([known[:, :, ::-1], blank])
    found = report(train, validation, made, same)
    assert (found["copies, real"], found["copies, samples"]) == (0.0, 0.5)
    assert found["distance to training, real"] == pytest.approx(0.5)
    assert found["distance to training, samples"] == pytest.approx(0.25)


def test_copies_are_of_what_the_tokenizer_makes_of_training_pictures():
    known, held_out = flat(0, 200), flat(100)
    train, validation = Pictures(known, np.array([0, 0])), Pictures(held_out, np.array([0]))
    brighter = lambda images: images + 51  # an error of 0.2, or 13.98 dB
    found = report(train, validation, lambda labels: flat(51, 51 + 10), brighter)
    assert found["validation PSNR (dB)"] == pytest.approx(13.98, abs=0.01)
    assert found["copies, samples"] == 0.5  # 10 levels off is 0.039
    assert found["distance to training, real"] == pytest.approx(100 / 255, abs=1e-4)
