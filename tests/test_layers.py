"""Imports point downward in the list of rooms."""

import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "var_jax"
ROOMS = (
    "training", "sampling", "evaluation", "data", "models", "checkpoints", "sharding", "tools",
    "config", "schedule",
)  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below(room):
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
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
    below = ROOMS[ROOMS.index(room) :]
    assert found <= {*below, "config"}


def test_networks_know_no_checkpoint_of_ours():
    files = (PACKAGE / "models").rglob("*.py")
    found = re.findall(r"var_jax\.checkpoints\.\w+", "".join(file.read_text() for file in files))
    assert set(found) == {"var_jax.checkpoints.torch"}  # of which features/ reads weights
