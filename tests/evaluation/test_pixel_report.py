"""The pixel report finds near-copies and little variety."""

import sys

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.data.sources import ArraySource
from var_jax.evaluation.pixel_report import (
    fit,
    nearest_distance,
    report,
    say_what_is_left_out,
    variety,
)


def source(images, labels):
    """A source in memory."""
    return ArraySource(images, np.array(labels, np.int32), tuple("abc"), images.shape[1])


def same(images):
    """A tokenizer without error."""
    return images


def flat(*levels):
    """Images of one grey each, 0 to 255."""
    return np.array(levels, np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


def test_without_scikit_learn_all_else_is_reported(monkeypatch, capsys):
    items = source(flat(0, 80, 160, 240), [0, 0, 1, 1])
    draw = lambda labels: flat(*labels)
    whole = report(items, items, draw, same)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(BadInput, match=r"pip install 'var_jax\[report\]'"):
        fit(items.images, items.labels)
    assert not capsys.readouterr().err
    found = report(items, items, draw, same)
    assert not capsys.readouterr().err
    say_what_is_left_out()
    assert "class agreement is left out" in capsys.readouterr().err
    missing = whole.keys() - found.keys()
    assert missing and all("class agreement" in n or n.startswith("  ") for n in missing)
    assert found == {name: whole[name] for name in found}


def test_distance_to_the_nearest():
    near = nearest_distance(flat(0, 100, 255), flat(10, 90, 255))
    np.testing.assert_allclose(near, np.array([10, 10, 0]) / 255, atol=1e-4)


def test_variety_is_within_a_class():
    images, labels = (
        flat(0, 7, 51, 7, 255),
        np.array([0, 1, 0, 1, 2], np.int32),
    )  # 51 apart, 0, and one alone
    assert variety(images, labels, np.array([0, 1], np.int32)) == pytest.approx(
        0.5 * 51 / 255, abs=1e-4
    )


@pytest.mark.parametrize("held_out, given", [([0, 0, 1], True), ([0, 1, 2], False)])
def test_variety_is_given_where_validation_images_share_a_class(held_out, given):
    items = lambda labels: source(flat(*range(0, 40 * len(labels), 40)), labels)
    report_ = report(items([0, 0, 1, 1, 2, 2]), items(held_out), lambda labels: flat(*labels), same)
    assert ("distance within a class, validation" in report_) == given
    if given:  # both of class 0 are the same
        assert report_["distance within a class, samples"] == 0


def test_copies_may_be_mirrored():
    """A training image is a bar at the left, one of the samples the same at the right."""
    training = np.zeros((1, 4, 4, 3), np.uint8)
    training[0, :, 0] = 255
    blank = np.zeros_like(training)  # a quarter of the pixels is off by 1: RMS of 0.5
    train, validation = source(training, [0]), source(blank, [0])
    samples = lambda labels: np.concatenate([training[:, :, ::-1], blank])
    found = report(train, validation, samples, same)
    assert (found["near-copies, validation"], found["near-copies, samples"]) == (0.0, 0.5)
    assert found["distance to training, validation"] == pytest.approx(0.5)
    assert found["distance to training, samples"] == pytest.approx(0.25)


def test_copies_are_of_what_the_tokenizer_makes_of_training_images():
    training, held_out = flat(0, 200), flat(100)
    train, validation = source(training, [0, 0]), source(held_out, [0])
    brighter = lambda images: images + 51  # an error of 0.2, or 13.98 dB
    found = report(train, validation, lambda labels: flat(51, 51 + 10), brighter)
    assert found["validation PSNR (dB)"] == pytest.approx(13.98, abs=0.01)
    assert found["near-copies, samples"] == 0.5  # 10 levels off is 0.039
    assert found["distance to training, validation"] == pytest.approx(100 / 255, abs=1e-4)
