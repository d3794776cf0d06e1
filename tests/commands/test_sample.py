"""`var_jax.sample` from outside: counts, rejection, the image of scales, unfinished runs."""

import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from running import complaint, run, start, start_several, wait_for

import var_jax
from var_jax import BadInput
from var_jax.checkpoints.export import fingerprint
from var_jax.config import SamplingConfig
from var_jax.evaluation.likelihood import class_scores
from var_jax.sample import counted
from var_jax.sampling.exports import load_models, load_parts, save_parts
from var_jax.sharding.mesh import make_mesh
from var_jax.tools.npz import load_npz, save_npz

SCORER = "def brightness(images, labels):\n    return images.mean((1, 2, 3))\n"


def sample(checkpoint, out, *flags):
    code, _, err = run("sample", "--checkpoint", checkpoint, "--out", out, *flags)
    assert code == 0, err
    return load_npz(out / "samples.npz")


@pytest.mark.slow
def test_rejection_keeps_the_best_samples(untrained, tmp_path, monkeypatch):
    (tmp_path / "scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    shared = ("--batch_size", 4, "--show_scales")
    every = sample(untrained, tmp_path / "all", "--labels", "7:3,flags:2,7:3,flags:2", *shared)
    assert every["labels"].tolist() == [7, 7, 7, 8, 8] * 2
    flags = ("--labels", "7:3,flags:2", "--reject", 0.5, "--scorer", "scorers:brightness", *shared)
    kept = sample(untrained, tmp_path / "kept", *flags)
    assert kept["labels"].tolist() == [7, 7, 7, 8, 8]
    for label, count in ((7, 3), (8, 2)):
        theirs = every["arr_0"][every["labels"] == label]
        order = np.argsort(-theirs.mean((1, 2, 3)), kind="stable")[:count]
        np.testing.assert_array_equal(kept["arr_0"][kept["labels"] == label], theirs[sorted(order)])
    scale, gap = 6, 2
    assert Image.open(tmp_path / "all" / "scales.png").size == (
        3 * (16 * scale + gap) - gap, 8 * (16 * scale + gap) - gap,
    )  # fmt: skip
    last = np.asarray(Image.open(tmp_path / "all" / "scales.png"))[: 16 * scale, -16 * scale :]
    np.testing.assert_allclose(last[::scale, ::scale].astype(int), every["arr_0"][0], atol=1)


@pytest.mark.slow
def test_rejection_by_the_model_itself(other, tmp_path):
    every = sample(other, tmp_path / "all", "--labels", "d:4,d:4")
    flags = ("--labels", "d:4", "--reject", 0.5)
    kept = sample(other, tmp_path / "kept", *flags)
    models = var_jax.load(other).models
    parts = models.tokenizer.quantizer, models.transformer
    order = np.argsort(-class_scores(*parts, every["tokens"], every["labels"]))[:4]
    np.testing.assert_array_equal(kept["tokens"], every["tokens"][sorted(order)])
    flags = ("--checkpoint", other, *flags, "--smooth", "--out", tmp_path / "smooth")
    assert "--reject needs --scorer here" in complaint("sample", *flags)


def test_rejection_of_the_emoji_takes_scikit_learn(untrained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    flags = ("--checkpoint", untrained, "--labels", 3, "--reject", 0.5, "--out", tmp_path / "out")
    assert "pip install 'var_jax[report]'" in complaint("sample", *flags)


def test_bad_input(untrained, tmp_path, monkeypatch):
    model = var_jax.load(untrained)  # once
    monkeypatch.setattr(var_jax, "load", lambda *args, **how: model)
    parts = tmp_path / "begun" / "parts"
    parts.mkdir(parents=True)
    (parts / "settings.json").write_text(json.dumps({"weights": "another"}))
    (parts / "00000000.npz").touch()
    out = tmp_path / "out"
    said = {
        (): "say what to draw: --labels, --num or both",
        ("--labels", "dogs"): "the classes of this checkpoint are Smileys & Emotion",
        ("--labels", "9"): "--labels holds 9; classes are 0 to 8",
        ("--labels", "3:0"): "--labels holds 3:0; expected a count of 1 to 100000000",
        ("--labels", "3:2", "--num", 9): "--labels holds counts, so --num=9 has no place",
        ("--labels", 3, "--reject", 0.5, "--scorer", "os:nothing"): "is no MODULE:FUNCTION here",
        ("--labels", 3, "--reject", 0.5, "--scorer", "os:path"): "--scorer=os:path is no function",
        ("--labels", 3, "--cfg", "nan"): "--cfg=nan; expected a finite number",
        ("--labels", 3, "--top_p", ".5,.4"): "top_p=0.5,0.4 has 2 numbers; expected one",
        ("--labels", 3, "--top_p", "1.5"): "top_p=1.5; expected 0 to 1",
        ("--labels", 3, "--top_p", "most"): "--top_p=most; expected numbers",
        ("--labels", 3, "--top_k", "-1"): "top_k=-1; expected a whole number of at least 0",
        ("--labels", 3, "--top_k", "9,.5,9"): "top_k=0.5; expected a whole number",
        ("--labels", 3, "--temperature", "0"): "temperature=0.0; expected 0.01 to 100, once or",
        ("--labels", 3, "--temperature", "1,1"): "temperature=1.0,1.0 has 2 numbers",
        ("--labels", 3, "--guidance", "more"): "guidance='more'; expected ramp, constant, interval",
        ("--labels", 3, "--guidance", "interval=2-4"): "guidance=interval=2-4; there are 3 scales",
        ("--labels", 3, "--draft_scales", 2): "refiner and draft_scales go together",
        ("--labels", 3, "--refiner", untrained): "refiner and draft_scales go together",
        ("--labels", 3, "--refiner", untrained, "--draft_scales", 3): "draft_scales=3; expected 1",
        ("--labels", 3, "--cfg", 0, "--guidance", "constant"): "guidance=constant is of cfg, the",
        ("--labels", 3, "--refiner", "emoji", "--draft_scales", 2): "has patch_nums=(1, 1, 1, 2,",
        ("--labels", "3:²"): "--labels holds '3:²'",
        ("--labels", 3, "--smooth", "--show_scales"): "--show_scales needs tokens",
        ("--labels", 3, "--out", Path(__file__)): "test_sample.py",
        ("--labels", 3, "--out", parts.parent): "holds samples of other weights",
    }
    for flags, expected in said.items():
        assert expected in complaint("sample", "--checkpoint", untrained, "--out", out, *flags)
    assert not out.exists()


def test_counts_and_names_with_colons():
    names = ("cat", "cat:3", "1", "emu:9")
    said = {"cat": (0, None), "cat:5": (0, 5), "cat:3:2": (1, 2), "emu:9": (3, None), "3:4": (3, 4)}
    assert {entry: counted(entry, names) for entry in said} == said
    for entry, sentence in (
        ("cat:3", r"the class of this name \(say cat:3:1\) or 3 of 'cat' \(say number=0:3\)"),
        ("1:20", "which may mean the class '1'"),
    ):
        with pytest.raises(BadInput, match=sentence):
            counted(entry, names)
    assert counted("name=1:20", names) == (2, 20) and counted("number=1:20", names) == (1, 20)


def test_settings_cannot_change_once_there_are_images(untrained, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"batch_size": 64}))  # it ran out of memory
    (parts / ".00000000.npz.partial").write_bytes(b"PK")  # and then was killed
    samples = sample(untrained, tmp_path, "--labels", "3:2")
    assert samples["labels"].tolist() == [3, 3] and not parts.exists()


@pytest.mark.slow
def test_the_settings_of_the_checkpoint(untrained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(untrained, copy)
    about = json.loads((copy / "config.json").read_text())
    del about["checksums"]
    about["sampling"] = {"cfg": 3.0, "top_k": 5, "top_p": [1, 0.9, 0.7]}
    (copy / "config.json").write_text(json.dumps(about))
    by_itself = sample(copy, tmp_path / "a", "--labels", "3:4")
    flags = ("--cfg", 3, "--top_k", 5, "--top_p", "1,.9,.7")
    by_flags = sample(untrained, tmp_path / "b", "--labels", "3:4", *flags)
    np.testing.assert_array_equal(by_itself["tokens"], by_flags["tokens"])
    overridden = sample(copy, tmp_path / "c", "--labels", "3:4", "--top_k", 1)
    assert (overridden["tokens"] != by_itself["tokens"]).any()


@pytest.mark.slow
def test_a_refiner_of_the_same_weights_changes_nothing(untrained, tmp_path):
    plain = sample(untrained, tmp_path / "plain", "--labels", "3:4")
    flags = ("--labels", "3:4", "--refiner", untrained, "--draft_scales", 2)
    np.testing.assert_array_equal(
        sample(untrained, tmp_path / "refined", *flags)["tokens"], plain["tokens"]
    )


def test_a_refiner_of_another_tokenizer_or_other_classes(untrained, tmp_path):
    parts, _ = load_parts(untrained)
    about = json.loads((untrained / "config.json").read_text())
    names, settings = about["class_names"], SamplingConfig()
    weights = parts["tokenizer"].quantizer
    weights.codebook = nnx.Param(weights.codebook[...] + 1)
    save_parts(tmp_path / "tokenizer", parts, names, settings)
    save_parts(tmp_path / "classes", parts, names[::-1], settings)
    flags = ("--checkpoint", untrained, "--labels", 3, "--draft_scales", 2, "--refiner")
    for name, sentence in (("tokenizer", "has other weights"), ("classes", "has other classes")):
        said = complaint("sample", *flags, tmp_path / name, "--out", tmp_path / "out")
        assert sentence in said and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_unfinished_run_continues(untrained, tmp_path):
    flags = ("--labels", "3:4", "--batch_size", 2)
    whole = sample(untrained, tmp_path / "whole", *flags)
    models = load_models(str(untrained), make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    settings = {"labels": ["3:4"], "num": None, "smooth": False, "reject": 1.0, "scorer": None}
    settings |= {"seed": 0, "batch_size": 2, "dtype": "auto", "cfg": 1.5, "top_k": 900}
    settings |= {"weights": fingerprint(models.tokenizer) + fingerprint(models.transformer)}
    parts = tmp_path / "begun" / "parts"
    parts.mkdir(parents=True)
    (parts / "settings.json").write_text(json.dumps(settings | {"top_p": "0.96"}))
    half = {name: array[:2] for name, array in whole.items()}
    half["arr_0"] = 255 - half["arr_0"]  # which shows that it is not sampled again
    save_npz(parts / "00000000.npz", **half)
    resumed = sample(untrained, tmp_path / "begun", *flags)
    np.testing.assert_array_equal(resumed["arr_0"][:2], half["arr_0"])
    np.testing.assert_array_equal(resumed["arr_0"][2:], whole["arr_0"][2:])


@pytest.mark.slow
def test_images_are_the_same_on_any_devices_and_hosts(untrained, tmp_path):
    flags = ("--checkpoint", untrained, "--num", 20, "--batch_size", 8, "--show_scales", "--out")
    for out, count, devices, more in (
        ("one", 1, 1, ()), ("mesh", 1, 8, ("--fsdp", 2)), ("hosts", 2, 4, ("--fsdp", 8)),
    ):  # fmt: skip
        running = start_several(count, "sample", *flags, tmp_path / out, *more, devices=devices)
        said = [process.communicate(timeout=500) for process in running]
        assert [process.returncode for process in running] == [0] * count, said
    assert sum("20 images are in" in out for out, _ in said) == 1
    for name in ("samples.npz", "grid.png", "scales.png"):
        whole = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "mesh" / name).read_bytes() == whole
        assert (tmp_path / "hosts" / name).read_bytes() == whole


@pytest.mark.slow
def test_a_killed_run_repeats_and_loses_nothing(untrained, tmp_path):
    flags = ("--num", 2000, "--batch_size", 4)
    whole = sample(untrained, tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    process = start("sample", "--checkpoint", untrained, "--out", out, *flags)
    wait_for(out / "parts" / "00000040-00000044.npz")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "parts").exists()
    resumed = sample(untrained, out, *flags)
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "samples.npz"]
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)
