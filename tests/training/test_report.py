"""A config's `report` is the user's code: numbers of any kind are taken, what fails is said."""

from types import SimpleNamespace

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.config import SamplingConfig
from var_jax.sampling.exports import Models
from var_jax.training import run


def report(monkeypatch, function):
    """What a run takes from a report."""
    monkeypatch.setattr(run, "find_function", lambda *_: function)
    config = SimpleNamespace(report="mine:figures", seed=0)
    given = SimpleNamespace(config=config, train=None, validation=None)
    return run.Run.report(given, Models(None, None, (), SamplingConfig()))


def test_numbers_of_any_kind_are_taken(monkeypatch):
    found = report(monkeypatch, lambda *_: {"fid": np.float32(2.5), 3: np.array(1)})
    assert found == {"fid": 2.5, "3": 1.0} and type(found["fid"]) is float


@pytest.mark.parametrize("result", [None, {"fid": "low"}, {"fid": np.zeros(2)}])
def test_what_fails_is_said(monkeypatch, result):
    with pytest.raises(BadInput, match=r"config\.report=mine:figures failed with"):
        report(monkeypatch, lambda *_: result)
