"""benchmarks/gpu.py on a CPU, where it can be tried but measures nothing of worth."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from var_jax.config import Config, from_dict
from var_jax.tools.configs import load_config

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
TINY = Path(__file__).parent / "commands" / "tiny.py"


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


def test_no_part_begins_that_would_pass_the_deadline(tmp_path, monkeypatch, capsys):
    out, script = tmp_path / "gpu.json", runpy.run_path(str(SCRIPT))
    for minutes, parts in ((0, []), (2, ["check"])):  # one part takes all of two minutes
        began, clock = [], [1000.0]

        def start(part, *_, began=began, clock=clock):
            began.append(part)
            clock[0] += 60
            return {"checks": {part: "good"}}

        monkeypatch.setitem(script["main"].__globals__, "start", start)
        monkeypatch.setattr(script["time"], "monotonic", lambda clock=clock: clock[0])
        argv = ["gpu.py", "--minutes", str(minutes), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        script["main"]()
        said = capsys.readouterr()
        assert began == parts and out.exists() == bool(parts)
        assert said.out.count("not measured") == len(script["PARTS"]) - len(parts)
        assert said.err.count("s are left; start again") == len(script["PARTS"]) - len(parts)
    assert "| check | good |" in said.out


def test_attention_is_checked_at_an_even_and_an_odd_length():
    script = runpy.run_path(str(SCRIPT))
    lengths = [sum(side * side for side in sides) for sides in script["PATTERNS"]]
    assert [length % 2 for length in lengths] == [0, 1]


@pytest.mark.slow
def test_attention_is_checked_against_the_masked_one():
    script = runpy.run_path(str(SCRIPT))
    name, verdict = script["check_attention"]((1, 2))
    assert name == "attention blocks against masked, 5 tokens"
    assert verdict.startswith("values and gradients within")


def test_a_part_that_is_too_slow_is_stopped():
    part = runpy.run_path(str(SCRIPT))["start"]("check", None, True, 0.01)
    assert part == {"failed": "stopped after 0 s"}


@pytest.mark.parametrize("missing", ["torch", "models"])
def test_without_torch_or_the_release_only_ours_is_measured(missing, monkeypatch, capsys):
    if missing == "models":
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2"))
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    script, given = runpy.run_path(str(SCRIPT)), []
    codec = lambda name, release, small: given.append(release) or {"encode": {"ours": 1.0}}
    monkeypatch.setitem(script["measure"].__globals__, "codec", codec)
    found = script["measure"]("codec", "VAR", True)
    assert given == [None] and found["rows"] == {"encode": {"ours": 1.0}}
    assert f"only ours is measured: import of {missing} halted" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train d16", "sample d16"])
def test_a_part_measures_ours_and_the_release(part, monkeypatch):
    """With the smallest models, and of the release no more than that it is called."""
    script, asked = runpy.run_path(str(SCRIPT)), []

    def theirs(task):
        return lambda *args: asked.append((task, *args)) or {"eager": lambda: None}

    names = script["train"].__globals__
    config = from_dict(Config, load_config(str(TINY), ["transformer.num_classes=10"]))
    monkeypatch.setitem(names, "config_of", lambda name, small: config)
    monkeypatch.setitem(names, "ROUNDS", 1)
    monkeypatch.setattr("var_jax.tools.flops.peak_flops", lambda kind: 1e12)
    release = SimpleNamespace(training=theirs("training"), sampling=theirs("sampling"))
    kind, _, name = part.partition(" ")
    run = {"train": "train", "sample": "draw"}[kind]
    rows = script[run](name, release, True)
    wanted = {
        "train": (
            ["d16, train on tokens, 2 images", "d16, train on pixels, 2 images"],
            [("training", "d16", 2, False), ("training", "d16", 2, True)],
        ),
        "sample": (
            ["d16, sample 1 with guidance", "d16, sample 4 with guidance"],
            [("sampling", "d16", 1), ("sampling", "d16", 4)],
        ),
    }[kind]
    assert (list(rows), asked) == wanted
    for row in rows.values():
        assert row["ours"] > 0 and {"mfu", "eager"} <= row.keys()


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
