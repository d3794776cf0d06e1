"""Imports point downward: a layer reads those named for it, and what all may read."""

import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "var_jax"
MAY_IMPORT = {
    "training": {"data", "models", "infra"},
    "sampling": {"models", "infra"},
    "evaluation": {"data", "models"},
    "data": {"infra"},
    "models": set(),
    "infra": set(),
    "config": set(),
    "scales": set(),
}


@pytest.mark.parametrize("layer", MAY_IMPORT)
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
    assert found <= MAY_IMPORT[layer] | {layer, "config", "scales"}
