"""Rejection keeps the best of each class, and candidates are named by index."""

import numpy as np
import pytest

from var_jax.sampling.reject import best, candidates

LABELS = np.array([2, 0, 2, 2, 5, 0], np.int32)


@pytest.mark.parametrize(
    ("keep", "each"), [(0.5, [4, 6, 2]), (0.1, [20, 30, 10]), (0.4, [5, 8, 3])]
)
def test_candidates_of_each_class(keep, each):
    index = candidates(LABELS, keep)
    classes, counts = np.unique(LABELS[index % 6], return_counts=True)
    assert classes.tolist() == [0, 2, 5] and counts.tolist() == each
    assert (np.diff(index) > 0).all() and index[:6].tolist() == [*range(6)]


def test_keeping_all_is_no_rejection():
    np.testing.assert_array_equal(candidates(LABELS, 1.0), np.arange(6))
    np.testing.assert_array_equal(best(np.random.rand(6), LABELS, LABELS), np.arange(6))


def test_the_best_of_each_class_stand_where_their_labels_are():
    scored = LABELS[candidates(LABELS, 0.25) % 6]
    scores = np.random.default_rng(0).permutation(len(scored)).astype(float)
    chosen = best(scores, scored, LABELS)
    np.testing.assert_array_equal(scored[chosen], LABELS)
    assert len(set(chosen)) == 6
    for label in np.unique(LABELS):
        places = np.flatnonzero(np.equal(LABELS, label))
        ours = np.sort(scores[chosen[places]])
        np.testing.assert_array_equal(ours, np.sort(scores[scored == label])[-len(ours) :])
        assert (np.diff(chosen[places]) > 0).all()
