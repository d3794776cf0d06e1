"""benchmarks/gpu.py on a CPU, where it can be tried but measures nothing of worth."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from var_jax.config import Config, from_dict
from var_jax.tools.configs import load_config

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
TINY = Path(__file__).parent / "commands" / "tiny.py"


ABOUT = "H100, jax 1"


def test_the_table_says_what_is_missing():
    encode = {
        "unit": "images/s", "ours": 30.0, "eager": 10.0, "compiled": "—", "mfu": 0.5,
        "memory": {"ours": 2.0, "eager": 4.0},
    }  # fmt: skip
    one = {"unit": "ms an image", "ours": 40.0, "eager": 200.0, "memory": {}}
    done = {
        "codec": {"rows": {"encode": encode, "sample 1": one}},
        "train d30 ours": {"failed": "stopped after 60 s"},
    }
    lines = runpy.run_path(str(SCRIPT))["table"](ABOUT, done).splitlines()
    assert lines[0] == ABOUT
    assert "| encode | images/s | 30 | 0.5 | 2 | 10 | 4 | — |  | 3 |" in lines
    assert "| sample 1 | ms an image | 40 |  |  | 200 |  |  |  | 5 |" in lines
    assert "| train d30 ours | not measured (stopped after 60 s) | | | | | | | | |" in lines
    assert "| sample d16 | not measured | | | | | | | | |" in lines
    assert {text.count("|") for text in lines[2:]} == {11}


def test_what_is_measured_apart_is_one_row():
    ours = {"unit": "images/s", "ours": 30.0, "memory": {"ours": 40.0}}
    theirs = {"unit": "images/s", "eager": 15.0, "memory": {"eager": 59.0}}
    done = {
        "train d30 ours": {"rows": {"d30": ours}},
        "train d30 release": {"rows": {"d30": theirs}},
    }
    lines = runpy.run_path(str(SCRIPT))["table"]("", done).splitlines()
    assert [text for text in lines if text.startswith("| d30 ")] == [
        "| d30 | images/s | 30 |  | 40 | 15 | 59 |  |  | 2 |"
    ]


def test_what_does_not_run_is_a_dash_and_costs_no_other_figure(capsys):
    script = runpy.run_path(str(SCRIPT))
    program = script["Program"]

    def fails():
        raise RuntimeError("out of memory\nand more")

    works = program(lambda: None, lambda: 7.0)
    row = script["compare"](8, {"ours": program(fails), "eager": works, "compiled": program(fails)})
    assert row["ours"] == row["compiled"] == "—" and row["eager"] > 0
    assert row["memory"] == {"eager": 7.0}
    assert "ours: out of memory\n" in capsys.readouterr().err
    assert "| a | images/s | — |" in script["table"]("", {"codec": {"rows": {"a": row}}})
    assert script["theirs_of"](SimpleNamespace(codec=fails), "codec") == {}
    assert script["theirs_of"](None, "codec") == {}


def test_a_latency_is_the_inverse_of_a_rate(monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    clock = iter(range(100))
    monkeypatch.setattr(script["time"], "perf_counter", lambda: next(clock))  # a second a run
    programs = {"ours": script["Program"](lambda: None)}
    assert script["compare"](4, programs)["ours"] == 4
    assert script["compare"](4, programs, latency=True)["ours"] == 250


def test_memory_is_what_the_compiled_program_says():
    script = runpy.run_path(str(SCRIPT))
    double = jax.jit(lambda x: 2 * x)
    program = script["call"](double, jnp.ones(1_000_000))
    program.run()
    assert program.memory() == pytest.approx(0.008, rel=0.01)  # argument and result


@pytest.fixture
def begun(monkeypatch):
    """The script's `main` with parts that take a minute by a clock of its own; which have begun."""
    script, began = runpy.run_path(str(SCRIPT)), SimpleNamespace(parts=[], about=ABOUT, failing=())
    clock = [1000.0]

    def start(part, *_):
        if part == "about":
            return {"about": began.about}
        began.parts.append(part)
        clock[0] += 60
        return {"failed": "no luck"} if part in began.failing else {"checks": {part: "good"}}

    def run(out, minutes):
        began.parts = []
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", str(minutes), "--out", str(out)])
        script["main"]()
        return began.parts

    monkeypatch.setitem(script["main"].__globals__, "start", start)
    monkeypatch.setattr(script["time"], "monotonic", lambda: clock[0])
    began.run, began.all = run, list(script["PARTS"])
    return began


def test_no_part_begins_that_would_pass_the_deadline(begun, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert begun.run(out, 0) == [] and not out.exists()
    said = capsys.readouterr()
    assert said.out.count("not measured") == len(begun.all) and not said.err
    assert begun.run(out, 2) == ["check"]  # one part takes all of two minutes
    said = capsys.readouterr()
    assert said.out.count("not measured") == len(begun.all) - 1
    assert said.err.count("s are left; start again") == len(begun.all) - 1
    assert said.out.startswith(ABOUT) and "| check | good |" in said.out


def test_what_fails_each_time_waits_for_what_is_missing(begun, tmp_path):
    out, begun.failing = tmp_path / "gpu.json", ("check",)
    assert begun.run(out, 3) == begun.all[:2]
    assert begun.run(out, 3) == begun.all[2:4]
    assert begun.run(out, 60) == [*begun.all[4:], "check"]
    assert begun.run(out, 60) == ["check"]


def test_what_was_measured_elsewhere_is_measured_again(begun, tmp_path, capsys):
    out, begun.failing = tmp_path / "gpu.json", ()
    assert begun.run(out, 60) == begun.all
    begun.about = "H100, jax 1, torch 2"
    capsys.readouterr()
    assert begun.run(out, 2) == ["check"]
    assert capsys.readouterr().out.count("not measured") == len(begun.all) - 1
    begun.about = ABOUT
    assert begun.run(out, 60) == []
    capsys.readouterr()
    assert begun.run(out, 0) == []
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("H100")] == [
        ABOUT, "H100, jax 1, torch 2",
    ]  # fmt: skip


def test_what_is_measured_has_a_name_of_its_own(monkeypatch, capsys):
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["measure"].__globals__, "Release", lambda path: path)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2"))
    runs = [(None, False), (None, True), ("VAR", False), ("VAR", True)]
    names = [script["measure"]("about", *run)["about"] for run in runs]
    assert len(set(names)) == 4 and all("cpu, jax " in name for name in names)
    assert [("without the release" in name, "small" in name) for name in names] == [
        (True, False), (True, True), (False, False), (False, True),
    ]  # fmt: skip
    assert names[2].endswith("torch 2")


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


@pytest.fixture
def release(monkeypatch):
    """The release's programs, on a stand-in of torch with a GPU that keeps its settings."""
    said = []
    tell = lambda name, answer=None: lambda *args: said.append((name, *args)) or answer
    cuda = SimpleNamespace(
        is_available=lambda: True, synchronize=tell("synchronize"), empty_cache=tell("empty"),
        reset_peak_memory_stats=tell("reset"), max_memory_allocated=tell("peak", 3e9),
    )  # fmt: skip
    backends = SimpleNamespace(matmul=SimpleNamespace())
    torch = SimpleNamespace(
        cuda=cuda, compiler=SimpleNamespace(reset=tell("forget")), said=said,
        backends=SimpleNamespace(cudnn=SimpleNamespace(), cuda=backends),
        set_float32_matmul_precision=tell("precision"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "models", SimpleNamespace())
    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(SCRIPT))["Release"]("VAR")


def test_the_release_runs_as_published_in_tf32(release):
    torch = release.torch
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    assert torch.said == [("precision", "high")]


def test_memory_of_the_release_is_of_one_program_and_given_back(release):
    said = release.torch.said
    program = release.program(lambda: said.append(("run",)))
    said.clear()
    assert program.memory() == 3.0
    assert said == [("reset",), ("run",), ("synchronize",), ("peak",)]
    said.clear()
    release.tidy()
    assert said == [("forget",), ("empty",)]


def test_where_torch_cannot_compile_the_release_still_runs(release, capsys):
    compiled = release.program(release.compiled(lambda: None))  # this torch has no `compile`
    script = runpy.run_path(str(SCRIPT))
    row = script["compare"](1, {"eager": release.program(lambda: None), "compiled": compiled})
    assert row["eager"] > 0 and row["compiled"] == "—"


@pytest.mark.parametrize("side", ["ours", "release"])
def test_of_d30_ours_and_the_release_are_measured_apart(side, monkeypatch):
    script, asked = runpy.run_path(str(SCRIPT)), []
    names = script["measure"].__globals__
    draw = lambda *args, **kwargs: asked.append((*args, kwargs)) or {}
    monkeypatch.setitem(names, "draw", draw)
    monkeypatch.setitem(names, "Release", lambda path: path)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2"))
    script["measure"](f"sample d30 {side}", "VAR", True)
    wanted = {"ours": ("d30", None, True, {}), "release": ("d30", "VAR", True, {"ours": False})}
    assert asked == [wanted[side]]
    asked.clear()
    assert script["measure"](f"sample d30 {side}", None, True) == {"rows": {}}
    assert len(asked) == (side == "ours")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train d16", "sample d16"])
def test_a_part_measures_ours_and_the_release(part, monkeypatch):
    """With the smallest models, and of the release no more than that it is called."""
    script, asked = runpy.run_path(str(SCRIPT)), []

    def theirs(task):
        ask = lambda _, *args: asked.append((task, *args)) or {"eager": script["Program"](list)}
        return ask

    names = script["train"].__globals__
    config = from_dict(Config, load_config(str(TINY), ["transformer.num_classes=10"]))
    monkeypatch.setitem(names, "config_of", lambda name, small: config)
    monkeypatch.setitem(names, "ROUNDS", 1)
    monkeypatch.setattr("var_jax.tools.flops.peak_flops", lambda kind: 1e12)
    release = SimpleNamespace(training=theirs("training"), sampling=theirs("sampling"), tidy=list)
    kind, _, name = part.partition(" ")
    run = {"train": "train", "sample": "draw"}[kind]
    rows = script[run](name, release, True)
    wanted = {
        "train": (
            ["d16, train on tokens, 2 images", "d16, train on pixels, 2 images"],
            [("training", 2, False), ("training", 2, True)],
        ),
        "sample": (
            ["d16, sample 1 with guidance", "d16, sample 4 with guidance"],
            [("sampling", 1), ("sampling", 4)],
        ),
    }[kind]
    assert (list(rows), asked) == wanted
    for row in rows.values():
        assert row["ours"] > 0 and {"mfu", "eager"} <= row.keys()
        assert row["memory"]["ours"] > 0
    assert [row["unit"] for row in rows.values()] == {
        "train": ["images/s"] * 2, "sample": ["ms an image", "images/s"],
    }[kind]  # fmt: skip


def test_the_presets_transformer_has_a_reference_of_its_sizes(monkeypatch):
    script, asked = runpy.run_path(str(SCRIPT)), []
    step = lambda *_: script["Program"](list)
    monkeypatch.setitem(script["presets"].__globals__, "training_step", step)
    training = lambda config, *more: (
        asked.append((config.transformer.width, *more)) or {"eager": script["Program"](list)}
    )
    rows = script["presets"]("", SimpleNamespace(training=training, tidy=list), False)
    assert asked == [(192, 32, False)] * 2
    for name, row in rows.items():
        assert row["ours"] > 0 and (row["eager"] != "—") == ("on tokens" in name)
    assert len(rows) == 6


@pytest.mark.slow
def test_parts_are_saved_and_kept(tmp_path):
    out = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    run = lambda *more: subprocess.run(
        [sys.executable, SCRIPT, "--small", *more], capture_output=True, text=True, env=environment
    )
    about = json.loads(run("--part", "about").stdout)["about"]
    parts = runpy.run_path(str(SCRIPT))["PARTS"]
    kept = {part: {"rows": {}} for part in parts if part not in ("check", "codec")}
    out.write_text(json.dumps({about: kept}))
    done = run("--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())[about]["codec"]["rows"]
    assert done.stdout.count("100 % of tokens") == 3
    assert [line for line in done.stderr.splitlines() if line.endswith(" ...")] == [
        "about ...", "check ...", "codec ...",
    ]  # fmt: skip
