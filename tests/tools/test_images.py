"""Images hold the pixels given, where they belong."""

import numpy as np
import pytest
from PIL import Image

from var_jax.tools.images import GAP, curves, grid, labelled_rows, save_png


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), np.uint8)


def test_png_round_trip_leaves_nothing_beside(tmp_path, images):
    path = tmp_path / "new" / "a.png"
    save_png(path, images[1])
    save_png(path, images[0])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), images[0])
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_grid_places_images_row_by_row(images):
    sheet = grid(images, columns=3, pad=1)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, 3) and sheet.dtype == np.uint8
    np.testing.assert_array_equal(sheet[:4, :6], images[0])
    np.testing.assert_array_equal(sheet[5:9, 7:13], images[4])
    assert (sheet[5:, 14:] == 255).all()


def test_grid_enlarges_by_whole_pixels(images):
    sheet = grid(images[:2], columns=2, pad=0, scale=3)
    assert sheet.shape == (12, 36, 3)
    np.testing.assert_array_equal(sheet[1::3, 1::3], np.concatenate(images[:2], axis=1))


def test_rows_have_their_names_on_the_left(images):
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    sheet = labelled_rows({"red heart": images, "cat": images[:2]}, scale=1)
    left = sheet.shape[1] - (5 * 48 + 4 * GAP)
    np.testing.assert_array_equal(sheet[:32, left : left + 48], images[0])
    assert (sheet[:32, :left] < 100).any() and (sheet[32:, :left] < 100).any()
    assert (sheet[36:, left + 2 * 50 :] == 255).all()


def test_curves_writes_a_chart(tmp_path):
    x = np.arange(20)
    series = {f"chart {i}": {"train": (x, x**2), "held out": (x, x)} for i in range(4)}
    curves(tmp_path / "c.png", series)
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
