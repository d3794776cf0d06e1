"""The notebooks in colab/ are those of their scripts and hold outputs worth keeping in git.

`.ci/notebooks` executes them.
"""

import pathlib
import sys

import jupytext
import nbformat
import pytest
from absl import flags

import var_jax
from var_jax.data.pipeline import batches
from var_jax.data.sources import open_source

COLAB = pathlib.Path(__file__).parents[1] / "colab"
SCRIPTS = sorted(COLAB.glob("[0-9]*.py"))


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.stem)
def script(request):
    return request.param


def test_there_are_six():
    assert len(SCRIPTS) == len(list(COLAB.glob("*.ipynb"))) == 6


def test_a_notebook_has_the_cells_of_its_script(script):
    cells = [
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (
            jupytext.read(script, fmt="py:percent"),
            nbformat.read(script.with_suffix(".ipynb"), 4),
        )
    ]
    assert cells[0] == cells[1]


def test_outputs_are_there_and_small(script):
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < 500_000
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = ("image/png", "image/jpeg", "text/html")  # pages of rich are pictures too
    shown = [output.get("data", {}).get(kind, "") for output in outputs for kind in kinds]
    assert all(output.output_type != "error" for output in outputs)
    assert any(shown) and all(len(each) < 4 / 3 * 100_000 for each in shown)  # base64
    text = "".join(output.get("text", "") for output in outputs)
    assert not any(word in text for word in ("/home/", "/root/", "/tmp/", "error:"))


def test_the_arguments_of_a_notebooks_kernel_are_not_ours(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    flags.FLAGS.unparse_flags()  # as in a new kernel
    batch = next(batches(open_source("emoji", "train", 32), batch_size=4, seed=0))
    assert var_jax.load("emoji").encode(batch["image"]).shape == (4, 123)
