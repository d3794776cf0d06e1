"""Nearest training images are found exactly, whatever the parts, and copies are told."""

import numpy as np
import pytest
from etils import epath

from var_jax.data.sources import ArraySource
from var_jax.evaluation import memorization
from var_jax.evaluation.features import Features
from var_jax.evaluation.memorization import (
    Neighbours,
    distance_figures,
    nearest,
    neighbours_of,
)
from var_jax.tools.npz import save_npz

RNG = np.random.default_rng(0)
TRAINING = (RNG.standard_normal((50, 12)) + 20).astype(np.float32)
SAMPLES = np.concatenate([TRAINING[[7, 31]], TRAINING[:9] + 0.3, TRAINING[[49]]])


def stored(folder, rows, size):
    """Features in files of `size` rows."""
    paths = [epath.Path(folder / f"{size}-{i}.npz") for i in range(0, len(rows), size)]
    for i, path in enumerate(paths):
        save_npz(path, pool=rows[i * size : (i + 1) * size])
    return Features(tuple(paths), len(rows))


@pytest.mark.parametrize(("size", "rows"), [(50, 1000), (7, 5), (3, 5)])
def test_nearest(tmp_path, monkeypatch, size, rows):
    monkeypatch.setattr(memorization, "ROWS", rows)
    found = nearest(stored(tmp_path, SAMPLES, 12), stored(tmp_path, TRAINING, size), 4)
    exact = np.linalg.norm(SAMPLES[:, None].astype(np.float64) - TRAINING, axis=2)
    order = exact.argsort(axis=1)[:, :4]
    np.testing.assert_array_equal(found.index, order)
    np.testing.assert_allclose(found.distance, np.take_along_axis(exact, order, 1), rtol=1e-5)
    assert (found.distance[[0, 1, -1], 0] == 0).all()


def test_fewer_training_images_than_neighbours(tmp_path):
    found = nearest(stored(tmp_path, SAMPLES, 12), stored(tmp_path, TRAINING[:3], 2), 5)
    assert found.index.shape == (12, 3) and sorted(found.index[0]) == [0, 1, 2]


def test_near_copies_are_nearer_than_almost_all_validation_images():
    column = lambda *distances: Neighbours(np.array(distances)[:, None], np.zeros((1, 1), int))
    found = distance_figures(column(0, 0.5, 3, 9), column(*range(1, 102)))
    assert found["samples"]["near_copies"] == 0.5
    assert found["validation"]["near_copies"] == 2 / 101
    assert found["validation"]["nearest_distance_q01"] == 2
    assert found["validation"]["nearest_distance_q50"] == 51
    assert found["samples"]["images"] == 4


def test_the_picture_begins_with_the_nearest(monkeypatch):
    shown = {}

    def labelled_rows(rows, scale):
        shown.update(rows)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(memorization, "labelled_rows", labelled_rows)
    monkeypatch.setattr(memorization, "SHOWN", 3)
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 4, 4, 3), np.uint8)

    class Set:
        shape = images.shape

        def batches(self, size):
            return (images[i : i + 2] for i in range(0, 6, 2))

    distance = np.array([5, 1, 4, 0.25, 9, 2.0])[:, None] + np.arange(2)
    index = np.arange(12).reshape(6, 2)
    known = np.broadcast_to(np.arange(100, 112, dtype=np.uint8)[:, None, None, None], (12, 4, 4, 3))
    training = ArraySource(known, np.zeros(12, np.int32), ("one",), 4)
    neighbours_of(Set(), Neighbours(distance, index), training)
    assert [*shown] == ["1: 0.25", "2: 1.00", "3: 2.00"]
    rows = [[int(image[0, 0, 0]) for image in row] for row in shown.values()]
    assert rows == [[3, 255, 106, 107], [1, 255, 102, 103], [5, 255, 110, 111]]
