"""Images hold the pixels given, where they belong."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from var_jax.tools.images import (
    GAP,
    curves,
    going_on_without,
    grid,
    labelled_rows,
    save_png,
)


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


DRAWS = """
import os, sys
from var_jax.tools.images import curves
curves(sys.argv[1], {"loss": {"": ((1, 2), (3.0, 4.0))}})
print(os.environ["MPLBACKEND"])
"""


def test_curves_are_drawn_whatever_backend_a_notebook_names(tmp_path):
    backend, root = "module://matplotlib_inline.of_nowhere", Path(__file__).parents[2]
    env = os.environ | {"MPLBACKEND": backend, "MPLCONFIGDIR": "/proc/none"}
    argv = [sys.executable, "-c", DRAWS, tmp_path / "curves.png"]
    ran = subprocess.run(argv, env=env, cwd=root, capture_output=True, text=True)
    assert ran.stdout == f"{backend}\n", ran.stderr
    assert Image.open(tmp_path / "curves.png").size > (100, 100)


def test_what_is_only_looked_at_ends_no_run(capsys):
    with going_on_without("curves.png"):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "two\nlines")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("curves.png cannot be written (UnicodeDecode")
    with pytest.raises(KeyboardInterrupt), going_on_without("curves.png"):
        raise KeyboardInterrupt


def test_the_legend_of_a_chart_names_what_is_drawn(tmp_path, monkeypatch):
    """A training that was left out has no points."""
    seen = []
    monkeypatch.setattr(
        "var_jax.tools.images.save_charts", lambda path, figure, axes: seen.extend(axes)
    )
    curves(
        tmp_path / "curves.png", {"loss": {"tokenizer": ([], []), "transformer": ([1, 2], [3, 4])}}
    )
    assert [line.get_label() for line in seen[0].lines] == ["transformer"]
