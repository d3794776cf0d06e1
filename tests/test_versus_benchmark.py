"""benchmarks/versus.py: compute and tuning are equal, and tables say what was found."""

import csv
import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from var_jax import BadInput
from var_jax.config import Config, from_dict, settings
from var_jax.tools.flops import transformer_flops

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "versus.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_figures_of_other_settings_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    kept = runpy.run_path(str(SCRIPT.parent / "kept.py"))["kept"]
    path, calls = epath.Path(tmp_path / "a" / "figures.json"), []
    compute = lambda: calls.append(1) or {"FD": 3.0}
    for _ in range(2):
        assert kept(path, {"steps": 5, "scales": (1, 2)}, compute) == {"FD": 3.0}
    assert len(calls) == 1
    with pytest.raises(BadInput, match=r"figures\.json is of steps=5, not 6; name another --out"):
        kept(path, {"steps": 6, "scales": (1, 2)}, compute)
    older = {"train_tokenizer": {"steps": 3}}  # of a version that had no other fields
    kept(epath.Path(tmp_path / "older.json"), older, compute)
    newer = {"train_tokenizer": settings(Config())["train_tokenizer"] | older["train_tokenizer"]}
    kept(epath.Path(tmp_path / "older.json"), newer, compute)
    newer["train_tokenizer"]["rotation"] = True
    with pytest.raises(BadInput, match="name another --out"):
        kept(epath.Path(tmp_path / "older.json"), newer, compute)


class Study:
    """The second learning rate, the third guidance scale, noise and a top-p of 0.8 are the best."""

    def __init__(self):
        self.seen = []

    def loss(self, point):
        self.seen.append(point)
        return abs(point.rate - 1)

    def row(self, point):
        self.seen.append(point)
        good = "noise=0.2" in point.fields, "top_p=0.8" in point.fields
        return {"FD": abs(point.cfg - 2) + 2.0 - sum(good)}


@pytest.mark.parametrize("study", ["models", "coarse"])
def test_every_model_has_the_same_budgets_and_tuning(script, study):
    seen, best = Study(), "train_transformer.token_noise=0.2 sampling.top_p=0.8"
    points = script.STUDIES[study](seen, [1.0, 2.0, 4.0], 3)
    assert {(p.rate, p.cfg) for p in points} == {(1.0, 2.0)}
    for model in script.MODELS:
        mine = [(p.budget, p.seed) for p in points if p.model == model]
        assert mine == [(budget, seed) for budget in (1.0, 2.0, 4.0) for seed in range(3)]
        tuned = [p for p in seen.seen if p.model == model]
        trials = 6 if model == "dit" else 11  # which has no tokens
        assert len({*tuned}) == trials and {(p.budget, p.seed) for p in tuned} == {(2.0, 0)}
        assert {p.fields for p in points if p.model == model} == {best if trials > 6 else ""}


def test_trials_have_no_chosen_setting_and_none_twice(script):
    """A point spells a setting in several ways: the config's own, or the same said of it."""
    point = script.Point("raster", "versus:raster_4x4", 3.6, cfg=0.0)
    same = "train_transformer.token_noise=0 sampling.top_p=0.95"
    spelled = [point, point._replace(fields=same.split()[0]), point._replace(fields=same)]
    for each in spelled[1:]:
        assert script.config_of(each) == script.config_of(point)
    chosen = {"model": "raster", "budget": 3.6, "seed": 0, "learning rate": 0.04}
    chosen |= {"token noise": 0.0, "cfg": 0.0, "top-p": "0.95", "FD": 61.0}
    trained = {key: chosen[key] for key in list(chosen)[:5]} | {"validation loss": 2.0}
    slower, guided = trained | {"learning rate": 0.02}, chosen | {"cfg": 1.0, "FD": 62.0}
    noise = chosen | {"token noise": 0.2}
    trials = [slower, trained, guided, chosen, chosen | {}, noise, guided | {}]
    assert script.not_chosen([chosen], trials) == [slower, guided, noise]
    assert script.not_chosen([noise | {"seed": 1}], trials) == [slower, guided, chosen, noise]


def test_committed_trials_are_those_that_were_not_chosen(script):
    def read(name):
        with (SCRIPT.parent / "versus" / name).open() as file:
            return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    tuning = read("coarse_tuning.csv")
    assert script.not_chosen(read("coarse.csv"), tuning) == tuning


def test_every_round_of_each_model_is_timed(script, tmp_path, monkeypatch):
    for variant in ("", "_4x4"):
        configs, speeds = script.small_configs(variant), script.speeds
        monkeypatch.setitem(speeds.__globals__, "sampling", lambda config, batch: lambda: None)
        monkeypatch.setitem(speeds.__globals__, "cost", lambda config: (4, 5e8))
        rows = speeds(configs, ["1", "64"])
        assert len(rows) == 4 * 2 * 5 and {row["round"] for row in rows} == {*range(5)}
        assert {row["tokens"] for row in rows} == {"4x4" if variant else "8x8"}
    script.write_csv(tmp_path / "speeds.csv", rows)
    assert len((tmp_path / "speeds.csv").read_text().splitlines()) == 41
    for row in rows:
        row["s"] = {"var": 2.0, "dit": 6.0}.get(row["model"], 3.0) * (row["round"] + 1)
    lines = script.speed_table(rows).splitlines()
    assert len(lines) == 2 + 4 * 2
    assert "| dit | 32 | 4x4 | 4 | 0.5 | 64 | 18 | 3.00 |" in lines


@pytest.mark.parametrize("kind", ["var", "raster", "dit"])
def test_coarse_tokens_are_4x4_and_nothing_else_differs(script, kind):
    fine, coarse = (
        settings(from_dict(Config, script.load_config(f"versus:{kind}{variant}")))
        for variant in ("", "_4x4")
    )
    assert fine["tokenizer"]["patch_nums"][-1] == 8 and coarse["tokenizer"]["patch_nums"][-1] == 4
    assert [name for name in fine if fine[name] != coarse[name]] == ["tokenizer"]


def test_models_of_tokens_are_tuned_from_the_same_start(script):
    fields = lambda kind: script.load_config(f"versus:{kind}")
    for variant in ("", "_4x4"):
        var, raster = fields(f"var{variant}"), fields(f"raster{variant}")
        assert var.train_transformer == raster.train_transformer and var.sampling == raster.sampling


def test_equal_budgets_are_equal_operations(script):
    points = [script.Point("", f"ablation:{row}", 3.6) for row in script.ROWS]
    points += script.tries(None, [1.8, 3.6, 7.2], 1) + [
        script.Point("", f"versus:{model}", 3.6) for model in script.MODELS
    ]
    for point in points:
        config = from_dict(Config, script.config_of(point))
        training = config.train_transformer
        spent = training.steps * training.batch_size * transformer_flops(config.transformer)
        assert spent == pytest.approx(3.6e12, rel=2e-3), point


def test_tries_have_trainings_of_their_own(script):
    tries = {p.model: script.name_of(script.config_of(p)) for p in script.tries(None, [3.6], 1)}
    assert tries.pop("narrow top-p") == tries["var"]  # sampled otherwise
    assert len({*tries.values()}) == len(tries) == len(script.TRIES) - 1


def test_rows_that_differ_in_sampling_share_a_training(script):
    name_of = lambda spec, seed=0: script.name_of(script.config_of(script.Point("", spec, 3, seed)))
    names = {row: name_of(f"ablation:{row}") for row in script.ROWS}
    assert names["adaln"] == names["top_k"] == names["cfg"]
    assert len(set(names.values())) == len(names) - 2
    assert name_of("versus:var", 0) != name_of("versus:var", 1)


def test_trainings_whose_names_differ_behind_a_dot(script, tmp_path, monkeypatch):
    """Their summaries lie in files of their own."""

    def train(config, workdir):
        workdir.mkdir()
        (workdir / "summary.json").write_text(f'{{"loss": {config.seed}}}')

    monkeypatch.setitem(script.trained.__globals__, "train", train)
    for seed in (0, 1):
        config = script.config_of(script.Point("", "versus:var", 3, seed))
        workdir = epath.Path(tmp_path) / script.name_of(config)
        assert script.trained(config, workdir, {"seed": seed}) == {"loss": seed}


SMALL = """
import os, versus
from var_jax.tools import cli
load = versus.load_config
def small(*args):
    config = load(*args)
    config.data.source = os.environ["SOURCE"]
    return config
versus.load_config = small
versus.MODELS, versus.GUIDANCE, versus.OF_TOKENS = ("raster",), (0.0,), (("sampling.top_p=0.8",),)
cli.run(versus.main, versus.define_flags)
"""


def write_idx(path, array):
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape))
    with path.open("ab") as file:
        file.write(array.tobytes())


def write_images(folder):
    """100 images of noise to train on and 50 others, as Fashion-MNIST has them."""
    for split, count in (("train", 100), ("t10k", 50)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


@pytest.mark.slow
def test_a_study_of_one_step(tmp_path):
    """It trains, samples and measures; again it does none of that, and writes the same."""
    write_images(tmp_path)
    out = tmp_path / "out"
    flags = ("--budgets=0.01", "--seeds=1", "--num=10", "--tokenizer_steps=1", f"--out={out}")
    paths = os.pathsep.join((str(SCRIPT.parent), str(SCRIPT.parents[1])))
    env = {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "1", "SOURCE": f"idx:{tmp_path}"}
    env = os.environ | env
    results, found, times = ("points.csv", "tuning.csv", "table.md"), [], []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", SMALL, *flags], env=env, check=True, timeout=500)
        found.append([(out / name).read_text() for name in results])
        times.append({path: path.stat().st_mtime_ns for path in out.rglob("*.json")})
    assert found[0] == found[1] and times[0] == times[1]
    points, tuning, table = found[0]
    (row,) = csv.DictReader(points.splitlines())
    trials = [*csv.DictReader(tuning.splitlines())]
    losses = {float(each["learning rate"]): float(each["validation loss"]) for each in trials}
    assert len(losses | {float(row["learning rate"]): 0}) == 3
    assert float(row["FD"]) > 0 and row["top-p"] == "0.8"
    assert float(row["validation loss"]) <= min(losses.values())
    assert "| raster | 0.01 |" in table


def test_the_table_has_means_and_deviations(script, tmp_path):
    figures = dict.fromkeys(script.FIGURES, 0.5)
    row = {
        "model": "var",
        "budget": 1.8,
        "images": 8256,
        "learning rate": 0.02,
        "cfg": 1.0,
        "token noise": 0.2,
        "top-p": "0.8",
        "rFD": 7,
        "near-copies, real": 0.01,
        "passes": 9,
        "sampling GFLOPs": 0.19032,
    }
    rows = [row | figures | {"seed": s, "FD": 40.0 + s, "minutes": 3.0 + s} for s in (0, 1, 2)]
    lines = script.table(rows, figures | {"FD": 5.0}).splitlines()
    assert lines[2].startswith("| real images |  |  |  |  |  |  |  |  | 5 | 0.5 |")
    setting = "| var | 1.8 | 8,256 | 0.02 | 1 | 0.2 | 0.8 | 9 | 0.19 |"
    assert lines[3].startswith(f"{setting} 41 ± 1 | 0.5 ± 0 |")
    assert lines[-1] == "0.2 hours of training."
    script.draw(tmp_path / "points.png", rows, 5.0)
    script.write_csv(tmp_path / "points.csv", rows)
    assert (tmp_path / "points.png").stat().st_size > 10_000
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 4
