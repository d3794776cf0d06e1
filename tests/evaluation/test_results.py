"""The curve that `evaluate` draws over several settings, and codebook usage by scale."""

import json

import numpy as np
import pytest
from etils import epath

from var_jax.evaluation import results
from var_jax.evaluation.tokenizer import histograms, perplexity


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (("fid", "sfid", "inception_score", "kid"), ("inception_score", "fid")),
        (("fd_x", "kid_x", "precision_x", "recall_x"), ("recall_x", "precision_x")),
    ],
)
def test_a_sweep_has_a_curve_without_the_held_out_images(tmp_path, monkeypatch, names, axes):
    drawn = []
    monkeypatch.setattr(results, "curves", lambda path, series, x: drawn.append((series, x)))
    score = lambda start: {name: start + i for i, name in enumerate(names)}
    sets = {"cfg1": score(10.0), "cfg2": score(20.0), results.HELD_OUT: score(90.0)}
    about = {"flags": {"reference": "x"}}
    results.save(epath.Path(tmp_path), sets, about)
    x, y = axes
    line = (
        [sets[name][x] for name in ("cfg1", "cfg2")],
        [sets[name][y] for name in ("cfg1", "cfg2")],
    )
    points = {name: ([sets[name][x]], [sets[name][y]]) for name in ("cfg1", "cfg2")}
    assert drawn == [({y: {"": line} | points}, x)]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"sets": sets} | about


def test_use_and_perplexity_of_codes_are_of_their_scale():
    tokens = np.array([[0, 1, 1, 1, 1], [2, 3, 3, 1, 1]], np.int32)  # scales 1x1 and 2x2
    hits = histograms(tokens, (1, 2), 4)
    assert hits.tolist() == [[1, 0, 1, 0], [0, 6, 0, 2]]
    assert perplexity(hits[0]) == pytest.approx(2)
    assert perplexity(hits[1]) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
