"""The commands take the baselines as they take VAR, and say what only VAR can do."""

import json
import signal

import chex
import jax
import numpy as np
import pytest
from running import complaint, run, run_alone, start, wait_for
from tiny import get_config

import var_jax
from var_jax import BadInput
from var_jax.config import Config, from_dict
from var_jax.data.sources import open_source
from var_jax.sampling.exports import build, load_models, save_models
from var_jax.sharding.mesh import make_mesh
from var_jax.tools.configs import load_config
from var_jax.tools.flops import transformer_flops
from var_jax.training.aot import lower, model_flops

KINDS = ("raster", "dit")


def tiny(kind):
    """tests/commands/tiny.py with another transformer, of one layer."""
    config = get_config()
    config.transformer.update(kind=kind, depth=1)
    config.train_transformer.update(token_noise=0.0)
    config.sampling.update(steps=2)
    if kind == "raster":
        config.tokenizer.patch_nums = (4,)
    return config


def config_file(kind, folder):
    """A file of `tiny(kind)` for --config."""
    path, here = folder / "config.py", json.dumps(str(__file__.rpartition("/")[0]))
    path.write_text(
        f"import sys\nsys.path.append({here})\nfrom test_baseline_commands import tiny\n"
        f"get_config = lambda: tiny({kind!r})\n"
    )
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each kind a checkpoint of random weights."""
    names, folder = open_source("emoji", "train", 16).class_names, tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        config = from_dict(Config, tiny(kind).to_dict())
        models = {"tokenizer": build(config.tokenizer), "transformer": build(config.transformer)}
        rng = np.random.default_rng(0)
        draw = lambda x, rng=rng: rng.normal(0, 0.2, x.shape).astype(np.float32)
        save_models(folder / kind, jax.tree.map(draw, models), names, config)
    return folder


EDIT = ("--image", "benchmarks/emoji/face.png", "--box", "0,0,.5,1")
EVALUATE = ("--source", "emoji")


@pytest.mark.parametrize(
    ("kind", "command", "flags", "sentence"),
    [
        ("dit", "sample", ("--top_k", 5), "top_k=5 means nothing here: a model of kind dit is"),
        ("dit", "sample", ("--top_p", 0.5), "is sampled with cfg, steps, solver"),
        ("raster", "sample", ("--steps", 5), "is sampled with cfg, top_k, top_p"),
        ("raster", "sample", ("--top_p", "1,0.5"), "top_p=1.0,0.5 has 2 numbers; expected one"),
        ("raster", "sample", ("--smooth",), "smooth sampling mixes the codes of a scale"),
        ("dit", "sample", ("--smooth",), "smooth sampling mixes codes; a dit has none"),
        ("raster", "sample", ("--show_scales",), "--show_scales takes a model of kind var"),
        ("raster", "edit", EDIT, "editing takes a model of kind var; this one is of kind raster"),
        ("dit", "edit", EDIT, "editing takes a model of kind var; this one is of kind dit"),
        ("dit", "evaluate", ("--likelihood", *EVALUATE), "likelihood takes a model of kind var or"),
        ("dit", "evaluate", ("--classify", *EVALUATE), "kind var or raster; this one is of kind"),
    ],
)
def test_what_a_kind_cannot_do(checkpoints, tmp_path, monkeypatch, kind, command, flags, sentence):
    out = tmp_path / "out"
    if command == "sample":
        flags = ("--num", 2, *flags)
    if command == "edit":
        flags = ("--image", var_jax.__path__[0] + "/../benchmarks/emoji/face.png", *flags[2:])
    err = complaint(command, "--checkpoint", checkpoints / kind, *flags, "--out", out)
    assert sentence in err
    assert not [path for path in out.rglob("*") if path.name != ".lock"]


def test_the_library_refuses_what_the_commands_do(checkpoints):
    model = var_jax.load(checkpoints / "dit")
    assert model.kind == "dit" and repr(model).endswith("width 32, kind dit)")
    tokens = np.zeros((1, 21), np.int32)
    calls = {
        "tokens of samples": lambda: model.sample_tokens([0]),
        "coarse to fine": lambda: model.coarse_to_fine(tokens),
        "likelihood": lambda: model.log_likelihood(tokens),
        "showing an image scale by scale": lambda: next(model.stream(0)),
    }
    for what, call in calls.items():
        with pytest.raises(BadInput, match=f"{what} takes a model of kind var"):
            call()


@pytest.mark.slow
def test_a_dit_samples_by_its_own_settings(checkpoints, tmp_path):
    """Steps and solver of the checkpoint, which flags replace; there are no tokens."""
    flags = ("--checkpoint", checkpoints / "dit", "--num", 2, "--batch_size", 2)
    made = {}
    for name, more in {"plain": (), "same": ("--steps", 2), "other": ("--steps", 1)}.items():
        code, _, err = run("sample", *flags, *more, "--out", tmp_path / name)
        assert code == 0, err
        with np.load(tmp_path / name / "samples.npz") as found:
            assert set(found) == {"arr_0", "labels"}
            made[name] = found["arr_0"]
    np.testing.assert_array_equal(made["plain"], made["same"])
    assert (made["plain"] != made["other"]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_counts_its_passes(kind):
    config = from_dict(Config, tiny(kind).to_dict())
    once = transformer_flops(config.transformer, backward=False)
    passes = {"raster": 2, "dit": 2 * 2 * 2}[kind]  # guided; two Heun steps of two
    decoding = model_flops(config, "sampler") - passes * once
    assert 0 < decoding < model_flops(config, "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_train_sample_and_evaluate(kind, tmp_path):
    workdir, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint"
    train = ("--config", config_file(kind, tmp_path), "--workdir", workdir)
    code, out, err = run("train", *train, "--config.train_transformer.steps=6")
    assert code == 0, err
    unit = "squared error of the velocity" if kind == "dit" else "nats a token"
    assert f"validation loss ({unit})" in out
    code, out, err = run("train", *train)  # goes on, to twelve steps
    assert code == 0 and "the transformer goes on to step 12" in err
    assert (workdir / "samples.png").exists() and (workdir / "curves.png").exists()
    code, _, err = run("sample", "--checkpoint", checkpoint, "--num", 9, "--out", tmp_path / "made")
    assert code == 0, err
    flags = ("--checkpoint", checkpoint, "--out", tmp_path / "figures")
    if kind == "raster":
        code, _, err = run("evaluate", *flags, "--likelihood", "--source", "emoji")
        assert code == 0, err
        found = json.loads((tmp_path / "figures" / "metrics.json").read_text())
        assert found["loss"] < 4.3 and found["bits_per_image"] == pytest.approx(
            16 * found["loss"] / np.log(2), rel=1e-5
        )
    emoji, reference = open_source("emoji", "train", 16), tmp_path / "reference.npz"
    np.savez(reference, np.stack([emoji[i]["image"] for i in range(64)]))
    compared = ("--reference", reference, "--num", 64, "--cfg", "0,1")
    code, _, err = run("evaluate", *flags[:2], *compared, "--out", tmp_path / "quality")
    assert code == 0, err
    found = json.loads((tmp_path / "quality" / "metrics.json").read_text())
    assert {"cfg0", "cfg1"} <= set(found["sets"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_with_the_weights_of_one_never_stopped(kind, checkpoints, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train = (
        "train", "--config", config_file(kind, tmp_path), "--config.train_tokenizer.steps=0",
        f"--config.pretrained_tokenizer={checkpoints / kind}", "--config.report=", "--workdir",
    )  # fmt: skip
    code, _, err = run_alone(*train, whole)
    assert code == 0, err
    process = start(*train, killed)
    wait_for(killed / "transformer" / "4")  # of twelve steps
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    code, _, err = run_alone(*train, killed)
    assert code == 0 and "transformer: going on from step" in err, err
    ours, theirs = (load_models(folder / "checkpoint").transformer for folder in (killed, whole))
    chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["raster:227m", "raster:1.4b", "dit:xl2"])
def test_full_size_programs_lower(variant):
    config = from_dict(Config, load_config(f"baselines:{variant}"))
    mesh = make_mesh(2, 4, 1)
    with jax.set_mesh(mesh):
        for program in ("transformer", "sampler"):
            lowered, held = lower(config, program, mesh, 256)
            assert held["bytes_parameters"] > 8e7 and lowered.as_text()
