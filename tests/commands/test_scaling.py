"""Laws from what runs leave: constants come back, and what is no ladder is refused."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from running import complaint, run

from var_jax import scaling
from var_jax.config import Config, TransformerConfig, from_dict, settings
from var_jax.evaluation.scaling_report import (
    best_rates,
    budgets,
    budgets_of,
    equal_data,
    frontier_law,
    whole_schedules,
)
from var_jax.sampling.exports import build
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.tools.flops import flops_by_part, matmul_flops, transformer_flops
from var_jax.training.results import parameters, read_rows

DEPTHS = (2, 3, 4, 5, 6, 8)
SURFACE = (2.0, 0.05, 0.3, 1.0, 0.25)  # E + A·N^-α + B·D^-β, N in billions, D in images
STEPS = 100


def write_run(folder, depth, *, seed=0, summary=True, last=STEPS, **changes):
    """A work directory as a training of this depth leaves it, with losses of SURFACE."""
    config = load_config(f"ladder:{depth}")
    config.seed, config.transformer.num_classes = seed, 10
    config.train_transformer.steps = STEPS
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    config = from_dict(Config, config)
    folder.mkdir(parents=True)
    fields = settings(config) | {"fingerprint": "abc", "copies": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "data.json").write_text(json.dumps([{"train": {"images": 60_000}}]))
    size = parameters(config.transformer, config.tokenizer)["parameters"]
    records = [validation(size, step, seed) for step in range(20, last + 1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if summary:
        (folder / "summary.json").write_text("{}")
    return folder


def validation(parameters, step, seed):
    """A record of the validation hook."""
    E, A, alpha, B, beta = SURFACE
    loss = E + A * (parameters / 1e9) ** -alpha + B * (step * 32) ** -beta + 0.001 * seed
    figures = {f"val_loss{k}": loss for k in ("", "_last", "_scale1", "_scale2", "_scale3")}
    accuracy = {name.replace("loss", "accuracy"): 1 - loss / 10 for name in figures}
    return {"stage": "transformer", "step": step, "hook": "validation"} | figures | accuracy


def edit_last(folder, **figures):
    """Changes the last validation of the largest size."""
    path = folder / "d8-seed0/metrics.jsonl"
    *before, last = path.read_text().splitlines()
    path.write_text("\n".join([*before, json.dumps(json.loads(last) | figures), ""]))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A ladder of six sizes, two seeds of the smaller ones."""
    out = tmp_path_factory.mktemp("ladder")
    for depth in DEPTHS:
        for seed in range(2 if depth <= 4 else 1):
            write_run(out / f"d{depth}-seed{seed}", depth, seed=seed)
    return out


@pytest.fixture(scope="module")
def laws(ladder, tmp_path_factory):
    """What the command wrote of the ladder, and printed."""
    out = tmp_path_factory.mktemp("scaling") / "laws"
    code, printed, err = run("scaling", "--runs", ladder, "--out", out)
    assert (code, err) == (0, "")
    return out, printed


@pytest.mark.slow
def test_the_command_fits_draws_and_prints(laws):
    out, printed = laws
    assert "loss_last(N)" in printed and "Markov-VAR" in printed
    for beta, alpha in (("2", "0.23"), ("0.081", "0.0067")):  # VAR's loss(N) and error(C)
        assert any(line.split()[-2:] == [alpha, beta] for line in printed.splitlines())
    fit = json.loads((out / "fit.json").read_text())
    assert fit["runs"] == 9 and len(fit["sizes"]) == 6 and fit["images"] == 32 * STEPS
    law = fit["laws"]["loss_all(N)"]
    E, _, alpha, B, beta = SURFACE
    assert law["alpha"]["value"] == pytest.approx(alpha, rel=0.05)
    assert law["E"]["value"] == pytest.approx(E + B * (32 * STEPS) ** -beta, rel=0.01)
    low, high = law["alpha"]["interval"]
    assert low <= alpha <= high
    assert abs(fit["largest, held out"]["loss_all"]["residual, percent"]) < 0.1
    assert fit["loss_all(N, D)"]["alpha"]["value"] == pytest.approx(alpha, rel=0.1)
    assert fit["isoFLOP"]["budgets"]
    with Image.open(out / "laws.png") as image:
        assert image.size[0] > 1000


def test_iso_flop_curves_are_of_whole_runs_where_three_sizes_ended_alike():
    """Two budgets that three sizes reach within 1 %, one that two do; validations on the way."""
    rows, E, A, alpha, B, beta = [], *SURFACE
    for budget, sizes in ((1e13, (1e5, 3e5, 1e6)), (4e13, (3e5, 1e6, 3e6)), (2e14, (1e6, 3e6))):
        for i, N in enumerate(sizes):
            D = budget / (6 * N)
            loss = E + A * N**-alpha + B * D**-beta
            common = {"run": f"{N}-{budget}", "parameters": int(N), "steps": 100}
            done = {"step": 100, "compute": budget * (1 + 0.005 * i), "loss_all": loss}
            rows += [common | done, common | done | {"step": 50, "compute": 1e12, "loss_all": 9.0}]
    found = budgets_of(rows)
    assert [each.budget for each in found] == [1e13, 4e13]
    assert [each.N.tolist() for each in found] == [[1e5, 3e5, 1e6], [3e5, 1e6, 3e6]]
    assert all((each.loss < 9).all() for each in found)


def test_budgets_are_compute_within_2_percent():
    compute = np.array([1.0, 3.0, 1.019, 1.03, 3.0])
    assert budgets(compute).tolist() == [1.0, 3.0, 1.0, 1.03, 3.0]


def ended(parameters, budget, loss=1.0, step=10):
    """A row of a run of ten steps, as far as laws of compute read it."""
    run = f"{parameters}-{budget}"
    row = {"run": run, "parameters": parameters, "steps": 10, "step": step}
    return row | {"images": budget // parameters, "compute": budget, "loss_all": loss}


def test_laws_of_compute_are_of_ends_where_three_budgets_have_them():
    three = [ended(N, C) for C in (1000, 2000, 4000) for N in (1, 2, 4)]
    on_the_way = [ended(N, 8000, step=5) for N in (1, 2, 4)]
    assert whole_schedules([*three, *on_the_way]) == three
    assert whole_schedules([*three[:-1], *on_the_way]) == []


def test_a_frontier_has_a_run_a_budget():
    """A bad run just below a budget is not on it, and runs off it do not narrow intervals."""
    E, A, alpha, *_ = SURFACE
    C = np.geomspace(1e-3, 1, 6)
    compute = np.concatenate([C, C * 0.999, C * 1.005])
    y = np.concatenate([E + A * C**-alpha, 1.5 * (E + A * C**-alpha), 2 * (E + A * C**-alpha)])
    law = frontier_law(compute, y, np.arange(len(y)))
    np.testing.assert_array_equal(law.y, y[:6])
    assert law.runs == 6
    assert law.fit.alpha[0] == pytest.approx(alpha, rel=0.01)


def test_equal_data_is_of_the_most_sizes():
    """Of numbers of images that as many sizes have seen, the largest."""
    rows = [ended(N, N * D) for D, sizes in {5: 4, 7: 4, 9: 3}.items() for N in range(1, sizes + 1)]
    assert [(row["parameters"], row["images"]) for row in equal_data(rows)] == [
        (1, 7), (2, 7), (3, 7), (4, 7),
    ]  # fmt: skip


def test_sizes_of_a_budget_spend_it_all():
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/ladder.py"))
    for depth, budget in ((2, 2.0), (4, 2.0), (8, 8.0)):
        config = from_dict(Config, load_config(f"ladder:{depth}"))
        changed = script["with_budget"](config, budget)
        training = changed.train_transformer
        spent = training.steps * training.batch_size * transformer_flops(changed.transformer)
        assert spent == pytest.approx(budget * 1e12, rel=0.01)
        for other in (0.001, 1000.0):  # no whole step, many epochs
            assert script["with_budget"](config, other) is None
        assert training.learning_rate == config.train_transformer.learning_rate
        assert changed.every.evaluate == training.steps > training.warmup_steps > 0


@pytest.mark.slow
def test_the_points_stand_for_the_runs(laws, ladder):
    assert read_rows([str(laws[0] / "runs.csv")]) == read_rows([str(ladder)])
    text = (laws[0] / "runs.csv").read_text()
    header = text.splitlines()[0]
    sheet = laws[0].parent / "spreadsheet.csv"  # with a byte order mark, and a column of notes
    lines = [f"{line},{'note' if i == 0 else 'good'}" for i, line in enumerate(text.splitlines())]
    sheet.write_text("\ufeff" + "\r\n".join(lines))
    assert read_rows([str(sheet)]) == read_rows([str(ladder)])
    assert header.endswith("loss_scale1,loss_scale2,loss_scale3")


def test_runs_may_be_listed_as_a_shell_expands_them():
    seen = []
    argv = ["--runs", "a", "b,c", "--out", "x", "--runs=d"]
    assert cli.call(lambda args: seen.extend(args.runs), scaling.define_flags, argv) == 0
    assert seen == ["a", "b,c", "d"]


@pytest.mark.slow
def test_unfinished_runs_are_told_and_left_out(ladder, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(ladder, runs)
    write_run(runs / "d7", 7, summary=False, last=40)
    write_run(runs / "tokenizer", 4, train_transformer__steps=0)
    assert {row["depth"] for row in read_rows([str(runs)])} == {*DEPTHS}
    warning = f"{runs / 'd7'}: left out, unfinished (step 40 of {STEPS})\n"
    assert capsys.readouterr().err == warning


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda f: [shutil.rmtree(f / f"d{d}-seed0") for d in (4, 5, 6, 8)],
         "a law needs 3 sizes trained on equally many images; found sizes of 1"),
        (lambda f: (f / "d5-seed0/metrics.jsonl").write_text(""),
         "d5-seed0: metrics.jsonl holds no validation of the transformer"),
        (lambda f: write_run(f / "d7", 7, data__flip=True), "differ in data.flip: "),
        (lambda f: write_run(f / "d7", 7, train_transformer__schedule="cos"),
         "differ in train_transformer.schedule: "),
        (lambda f: write_run(f / "d7", 7, tokenizer__vocab_size=64), "differ in tokenizer.vocab"),
        (lambda f: (f / "d8-seed0/data.json").write_text("[3]"), "differ in images: "),
        (lambda f: (f / "d8-seed0/data.json").write_text("{"), "data.json is damaged"),
        (lambda f: (f / "d8-seed0/data.json").write_text("[]"), "data.json is damaged"),
        (lambda f: edit_last(f, val_accuracy_last=1.0), "step 100 has error_last=0.0; a law needs"),
        (lambda f: edit_last(f, val_loss=None), "step 100 has val_loss=None; expected a number"),
        (lambda f: edit_last(f, val_loss=float("nan")), "step 100 has loss_all=nan; a law needs"),
        (lambda f: (f / "d8-seed0/config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "d8-seed0/config.json").write_text('{"no": 1}'), "has no field 'no'"),
        (lambda f: [path.unlink() for path in f.glob("*/config.json")], "expected a work dir"),
        (lambda f: [path.unlink() for path in f.glob("*/summary.json")], "no finished training"),
    ],
)  # fmt: skip
def test_what_is_no_ladder(ladder, tmp_path, spoil, sentence):
    runs, out = tmp_path / "runs", tmp_path / "out"
    shutil.copytree(ladder, runs)
    shutil.rmtree(runs / "d4-seed1")  # so that no second seed stands for a size
    spoil(epath.Path(runs))
    code, _, err = run("scaling", "--runs", runs, "--out", out)
    assert code == 2 and sentence in err, err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "has no column 'run'"),
        ("run,step\nd2,3\n", "has no column 'recipe'"),
        (",x,", "line 2: depth='x'; expected a number"),
        (",-1,", "line 2: depth='-1'; expected a number"),
        (f",{10**400},", "expected a number of at least 0"),
    ],
)
def test_what_is_no_table(laws, tmp_path, text, sentence):
    path = tmp_path / "runs.csv"
    if text.startswith(","):
        lines = (laws[0] / "runs.csv").read_text().splitlines()
        cells = lines[1].split(",")
        cells[3] = text.strip(",")
        text = "\n".join([lines[0], ",".join(cells), *lines[2:]])
    path.write_text(text)
    assert sentence in complaint("scaling", "--runs", path, "--out", tmp_path / "new")


def test_of_runs_at_several_rates_the_best_counts(capsys):
    rows = [
        dict(run=name, variant=variant, learning_rate=0.1, steps=9, step=step, loss_all=loss)
        for name, variant, losses in [("a", 1, (1, 3)), ("b", 1, (5, 2)), ("c", 2, (5, 4))]
        for step, loss in zip((4, 9), losses, strict=True)
    ]
    assert {row["run"] for row in best_rates(rows)} == {"b", "c"}
    assert capsys.readouterr().err == "a: left out, another rate than 0.1 is better\n"


@pytest.mark.slow
def test_what_differs_in_more_than_its_rate_counts_too(ladder, tmp_path):
    shutil.copytree(ladder, tmp_path / "runs")
    other = write_run(tmp_path / "runs" / "d3drop", 3, transformer__drop_path=0.1)
    rows = read_rows([str(tmp_path / "runs")])
    assert {row["run"] for row in best_rates(rows)} >= {str(other), f"{tmp_path}/runs/d3-seed0"}


@pytest.mark.slow
def test_a_figure_that_cannot_be_drawn_costs_no_law(ladder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr(scaling, "draw", fail)
    code, printed, err = run("scaling", "--runs", ladder, "--out", tmp_path / "laws")
    assert code == 0 and "loss_last(N)" in printed
    assert "laws.png cannot be written (RuntimeError: latex could not be found)" in err
    assert {path.name for path in (tmp_path / "laws").iterdir()} == {"fit.json", "runs.csv"}


@pytest.mark.slow
def test_weights_by_kind_are_all_weights(ladder):
    config = TransformerConfig(depth=3, width=96, num_heads=3, vocab_size=64, latent_dim=8)
    counts = parameters(config, from_dict(Config, load_config("ladder:tokenizer")).tokenizer)
    whole = sum(leaf.size for leaf in jax.tree.leaves(build(config)))
    kinds = [counts[f"{kind}parameters"] for kind in ("", "head_", "embedding_")]
    assert sum(kinds) == whole
    assert kinds[0] == pytest.approx(18 * 3 * 96**2, rel=0.02)  # biases beside the paper's count
    assert kinds[1] == 96 * 64 + 64 + 2 * 96 * 96 + 2 * 96


def test_operations_by_kind_are_those_of_the_program():
    config = TransformerConfig(
        depth=2, width=64, num_heads=2, vocab_size=32, latent_dim=8, patch_nums=(1, 2, 3),
        attention="masked", num_classes=10,
    )  # fmt: skip
    model, L = build(config), config.num_tokens
    labels = jax.ShapeDtypeStruct((1,), np.int32)
    inputs = jax.ShapeDtypeStruct((1, L - 1, 8), np.float32)
    parts = flops_by_part(config)
    all_pairs = 4 * config.depth * config.width * L * L  # which this implementation computes
    start = 2 * config.latent_dim * config.width  # the first token is no word
    counted = matmul_flops(type(model).__call__, model, labels, inputs)
    biases = 2 * config.depth * config.width**2  # of the values, through the output projection
    assert counted == parts["blocks"] + parts["head"] + all_pairs - start + biases


@pytest.mark.slow
def test_rows_have_the_sizes_and_costs_of_their_run(ladder):
    rows = read_rows([str(ladder / "d2-seed0")])
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100]
    last = rows[-1]
    parts = last["attention_flops"] + last["head_flops"] + last["blocks_flops"]
    assert last["compute"] == parts == 5 * rows[0]["compute"]
    assert last["tokens"] == 30 * last["images"] == 30 * 32 * STEPS
    assert last["error_last"] == pytest.approx(last["loss_last"] / 10)
    assert last["tokenizer_flops"] > 0
