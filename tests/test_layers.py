"""Imports point downward: commands, then the folders in this order, then what all may read."""

import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "var_jax"
LAYERS = ["training", "sampling", "evaluation", "data", "models", "infra", "config", "scales"]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_lies_below(layer):
    files = list((PACKAGE / layer).glob("*.py")) or [PACKAGE / f"{layer}.py"]
    found = {
        name
        for file in files
        for name in re.findall(r"(?:from|import) var_jax\.(\w+)", file.read_text())
    }
    found |= {
        name
        for file in files
        for names in re.findall(r"from var_jax import (.*)", file.read_text())
        for name in names.split(", ")
        if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    }
    assert found <= set(LAYERS[LAYERS.index(layer) :])
