"""benchmarks/gpu.py on a CPU, where it can be tried but measures nothing of worth."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_table_says_what_is_missing():
    about = {"device": "H100", "versions": "jax 1"}
    rows = {"encode": {"ours": 30.0, "eager": 10.0, "compiled": "—", "mfu": 0.5}}
    done = {"codec": about | {"rows": rows}, "train d30": {"failed": "stopped after 60 s"}}
    lines = runpy.run_path(str(SCRIPT))["table"](done).splitlines()
    assert lines[0] == "H100, jax 1"
    assert "| encode | 30 | 0.5 |  | 10 | — | 3 |" in lines
    assert "| train d30 | not measured (stopped after 60 s) | | | | | |" in lines
    assert "| sample d16 | not measured | | | | | |" in lines


def test_what_does_not_run_is_a_dash_and_costs_no_other_figure(capsys):
    script = runpy.run_path(str(SCRIPT))

    def fails():
        raise RuntimeError("out of memory\nand more")

    row = script["compare"](8, fails, {"eager": lambda: None, "compiled": fails})
    assert row["ours"] == row["compiled"] == "—" and row["eager"] > 0
    assert "ours: out of memory\n" in capsys.readouterr().err
    assert "| a | — |" in script["table"]({"codec": {"rows": {"a": row}}})
    assert script["theirs_of"](SimpleNamespace(codec=fails), "codec") == {}
    assert script["theirs_of"](None, "codec") == {}


@pytest.mark.slow
def test_parts_are_saved_and_kept(tmp_path):
    out = tmp_path / "gpu.json"
    names = ("train d16", "sample d16", "train d30", "sample d30", "presets")
    out.write_text(json.dumps({name: {"rows": {}} for name in names}))
    command = [sys.executable, SCRIPT, "--small", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["codec"]["rows"]
    assert done.stdout.count("100 % of tokens") == 3
    assert [line for line in done.stderr.splitlines() if line.endswith(" ...")] == [
        "check ...", "codec ...",
    ]  # fmt: skip
