"""The commands from outside: what they leave, how they resume, what they say to bad input."""

import json
import re
import shutil
import signal
import socket

import chex
import numpy as np
import pytest
from PIL import Image
from running import TINY, complaint, run, run_alone, start, wait_for

from var_jax.checkpoints.torch.pth import write_pth
from var_jax.models.tokenizer import decode_tokens, encode_images
from var_jax.sampling.exports import load_models, load_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory of one uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "lr[1e-3] é?*"  # a path is literal
    code, out, err = run_alone("train", "--config", TINY, "--workdir", workdir)
    assert code == 0, err
    assert "samples / validation" in out
    return workdir


def test_what_training_leaves(trained):
    for name in ("reconstructions", "samples", "curves"):
        assert min(Image.open(trained / f"{name}.png").size) > 100
    summary = json.loads((trained / "summary.json").read_text())
    assert 0 < summary["class agreement, validation"] <= 1
    assert summary["distance to training, samples"] > 0
    assert summary["distance within a class, samples"] > 0
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    assert [r["step"] for r in steps if r["stage"] == "tokenizer" and "loss" in r] == [
        *range(1, 13)
    ]
    assert {"val_psnr", "val_loss"} <= {name for record in steps for name in record}


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(trained):
    before = (trained / "metrics.jsonl").read_text()
    code, _, err = run_alone("train", "--config", TINY, "--workdir", trained)
    assert code == 0, err
    assert (trained / "metrics.jsonl").read_text() == before


def test_sample(trained, tmp_path):
    flags = ("--checkpoint", trained / "checkpoint", "--batch_size", 8)
    code, _, err = run("sample", *flags, "--labels", "flags,0,3", "--out", tmp_path / "a")
    assert code == 0, err
    with np.load(tmp_path / "a" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 16, 16, 3) and samples["arr_0"].dtype == np.uint8
        assert samples["labels"].tolist() == [8, 0, 3]
        assert samples["tokens"].shape == (3, 21) and samples["tokens"].dtype == np.int32
    assert not (tmp_path / "a" / "parts").exists()
    code, _, err = run("sample", *flags, "--num", 20, "--out", tmp_path / "b")
    assert code == 0, err
    with np.load(tmp_path / "b" / "samples.npz") as samples:
        assert np.bincount(samples["labels"]).tolist() == [3, 3, 2, 2, 2, 2, 2, 2, 2]


def test_train_bad_input(tmp_path):
    workdir = tmp_path / "work"
    tiny = ("--config", TINY)
    gan = "--config.train_tokenizer.gan.weight=1", "--config.train_tokenizer.gan.layers=2"
    said = {
        (): "--config is missing",
        ("--config", "nowhere.py"): "nowhere.py",
        (*tiny, "--config.train_tokenizer.stepz=3"): "stepz",
        (*tiny, "--config.every.save=many"): "many",
        (*tiny, "--config.data.size=32"): "give latents of side 8",
        (*tiny, "--config.train_transformer.schedule=step"): "schedule='step' is not one of lin",
        (*tiny, "--config.train_tokenizer.learning_rate=nan"): "=nan; expected a finite number",
        (*tiny, "--config.train_transformer.steps=-3"): "steps=-3; expected at least 0",
        (*tiny, "--config.seed=-1"): "config.seed=-1; expected 0 to",
        (*tiny, "--process_id=1"): "need --coordinator or --distributed",
        (*tiny, "--config.mesh.data=3"): "does not cover the 8 devices",
        (*tiny, "--config.transformer.num_classes=10"): "has 9 classes",
        (*tiny, "--config.train_tokenizer.steps=0"): "leaves the tokenizer untrained; name a",
        (*tiny, "--config.transformer.attention=cudnn"): "attention=cudnn does not run here",
        (*tiny, "--config.transformer.patch_size=2"): "patch_size=2 is of dit",
        (*tiny, "--config.data.tokens=cache"): "token_noise=0.2 must be 0 with data.tokens",
        (*tiny, "--config.data.tokens=cache", "--config.train_transformer.token_noise=0"): (
            "data.tokens=cache holds the codes of a tokenizer"
        ),
        (
            *tiny,
            "--config.data.tokens=cache",
            "--config.train_transformer.token_noise=0",
            "--config.train_transformer.encoder_dtype=bfloat16",
        ): "encoder_dtype=bfloat16 is of images that are encoded in the step",
        (*tiny, "--config.train_transformer.encoder_dtype=half"): "encoder_dtype='half' is not one",
        (*tiny, "--config.pretrained_tokenizer=emoji"): "but config.tokenizer.vocab_size is 64",
        (*tiny, "--config.train_tokenizer.decoder_only=true"): "keeps the encoder of a trained tok",
        (*tiny, "--config.train_tokenizer.lpips_weight=1"): "takes images of 32 pixels a side or",
        (*tiny, "--config.train_tokenizer.gan.weight=1"): "takes images of 24 pixels a side or",
        (*tiny, *gan, "--config.train_tokenizer.gan.start=12"): "leaves the discriminator out of",
    }
    for flags, expected in said.items():
        assert expected in complaint("train", "--workdir", workdir, *flags)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lpips_file": "other.pth"}, "other.pth: tensor 'features.0.weight' is missing"),
        ({"gan.discriminator": "dino"}, "needs the weights of DINO ViT-S/16, https://"),
        (
            {"gan.discriminator": "dino", "gan.dino_file": "other.pth"},
            "other.pth: tensor 'blocks.0.norm1.weight' is missing",
        ),
    ],
)
def test_a_loss_without_its_weights_is_refused(tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    write_pth(tmp_path / "other.pth", {"fc.weight": np.zeros((2, 2), np.float32)})
    changes = {"steps": 2, "gan.weight": 0.1} | changes
    changes |= {"lpips_weight": 1} if "lpips_file" in changes else {}
    flags = [f"--config.train_tokenizer.{name}={value}" for name, value in changes.items()]
    assert sentence in complaint("train", "--config", "emoji", "--workdir", "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("train_tokenizer.batch_size=12", "train_tokenizer.batch_size=12 cannot be split evenly"),
        ("train_transformer.accumulate=4", "/ train_transformer.accumulate=4 cannot be split"),
    ],
)
def test_too_many_devices_for_the_batch(tmp_path, flag, sentence):
    err = complaint("train", "--config", TINY, "--workdir", tmp_path, f"--config.{flag}")
    assert sentence in err and "over 8 devices" in err


@pytest.mark.slow
def test_sampling_settings_may_change_later(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "work")
    flag = "--config.sampling.top_p=0.5"
    code, _, err = run_alone("train", "--config", TINY, "--workdir", workdir, flag)
    assert code == 0, err
    about = json.loads((workdir / "checkpoint" / "config.json").read_text())
    others = {"temperature": [1.0], "guidance": "ramp", "steps": 50, "solver": "heun"}
    assert about["sampling"] == {"cfg": 1.5, "top_k": [900], "top_p": [0.5], **others}
    images = ((d / "samples.png").read_bytes() for d in (workdir, trained))
    assert len(set(images)) == 2
    assert (workdir / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_environment_changes_no_number(trained, tmp_path, monkeypatch):
    for setting in (
        "JAX_ENABLE_X64=1", "JAX_DEFAULT_PRNG_IMPL=rbg", "JAX_RANDOM_SEED_OFFSET=5",
        "JAX_THREEFRY_PARTITIONABLE=0", "JAX_DEFAULT_MATMUL_PRECISION=bfloat16",
        "JAX_NUMPY_RANK_PROMOTION=raise", "NNX_GRAPH_MODE=0", "PYTHONHASHSEED=3", "LC_ALL=C",
        "TZ=Asia/Tokyo", "JAX_NUM_CPU_DEVICES=1",
    ):  # fmt: skip
        monkeypatch.setenv(*setting.split("="))
    (tmp_path / "elsewhere").mkdir()
    flags = ("--config", TINY, "--workdir", tmp_path / "work")
    code, _, err = run_alone("train", *flags, cwd=tmp_path / "elsewhere")
    assert code == 0 and "not used, as results would be others: JAX_DEFAULT_MATMUL" in err, err
    ours, theirs = ((d / "metrics.jsonl").read_text() for d in (tmp_path / "work", trained))
    assert ours == theirs


def test_another_configs_work_directory_is_refused(trained):
    flag = "--config.train_transformer.learning_rate=0.5"
    code, _, err = run("train", "--config", TINY, "--workdir", trained, flag)
    assert code == 2
    assert "train_transformer.learning_rate is 0.01, not 0.5" in err


def test_a_work_directory_with_less_is_named_before_it_is_touched(trained):
    flags = ("--config.train_transformer.steps=3", "--config.seed=1")
    before = {path: path.read_bytes() for path in trained.glob("*.json*")}
    err = complaint("train", "--config", TINY, "--workdir", trained, *flags)
    assert "steps is 12, not 3; config.seed is 0, not 1: set back what differs" in err
    assert before == {path: path.read_bytes() for path in trained.glob("*.json*")}


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps_and_other_periods(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "work")
    flags = ("--config.train_transformer.steps=14", "--config.every.log=2")
    code, _, err = run_alone("train", "--config", TINY, "--workdir", workdir, *flags)
    assert code == 0 and "the transformer goes on to step 14" in err, err
    old, new = ((d / "metrics.jsonl").read_text() for d in (trained, workdir))
    added = [json.loads(line) for line in new.removeprefix(old).splitlines()]
    assert new.startswith(old) and [r["step"] for r in added if "loss" in r] == [14]
    (change,) = json.loads((workdir / "config.json").read_text())["changes"]
    assert change == {
        "after": {"tokenizer": 12, "transformer": 12},
        "train_transformer.steps": [12, 14], "every.log": [1, 2],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["settings", "images"])
def test_hosts_that_differ_are_refused(tmp_path, differs):
    """By all of them, ahead of the first step: each would train on its own, and then wait."""
    for number in range(2):
        for name in ("a", "b"):
            (tmp_path / f"{number}/{name}").mkdir(parents=True)
            for i in range(60 - number):  # one copy stopped early
                image = np.full((16, 16, 3), 4 * i, np.uint8)
                Image.fromarray(image).save(tmp_path / f"{number}/{name}/{i}.png")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = ("--coordinator", f"localhost:{probe.getsockname()[1]}", "--num_processes", 2)
    flags = ("train", "--config", TINY, "--workdir", tmp_path / "run", "--config.report=", *place)
    more = [("--config.seed=0",), ("--config.seed=1",)]
    if differs == "images":
        of_data = "--config.transformer.num_classes=0"
        more = [(f"--config.data.source={tmp_path / str(i)}", of_data) for i in range(2)]
    running = [start(*flags, "--process_id", i, *more[i], devices=2) for i in range(2)]
    said = [process.communicate(timeout=200)[1] for process in running]
    wanted = {"settings": "the config differs on", "images": "holds differs on process 1"}[differs]
    for process, err in zip(running, said, strict=True):
        assert process.returncode == 2 and wanted in err, err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_each_training_alone(untrained, tmp_path):
    """A tokenizer by itself, its codes on disk, and a transformer that trains from them."""
    flags = ("--config", TINY, "--config.train_transformer.steps=0", "--workdir", tmp_path / "a")
    code, out, err = run("train", *flags)
    assert code == 0 and "samples / validation" not in out, err
    checkpoint, cache = tmp_path / "a" / "checkpoint", tmp_path / "cache"
    code, _, err = run("sample", "--checkpoint", checkpoint, "--num", 1, "--out", tmp_path / "no")
    assert code == 2 and "holds a tokenizer but no transformer" in err
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 20, 3), np.uint8)
    np.savez(tmp_path / "own.npz", arr_0=images, labels=np.arange(60) % 2)
    own = ("--images", tmp_path / "own.npz", "--cache", "--copies", 2, "--shift", 1)
    code, out, err = run("encode", "--checkpoint", checkpoint, *own, "--out", cache)
    assert code == 0 and "codes of 118 crops of 60 images" in out, err
    there = (
        f"--config.pretrained_tokenizer={checkpoint}", f"--config.data.tokens={cache}",
        f"--config.data.source={tmp_path / 'own.npz'}", "--config.transformer.num_classes=2",
        "--config.train_tokenizer.steps=0", "--config.train_transformer.token_noise=0",
    )  # fmt: skip
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path / "b", *there)
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").open()]
    assert {record["stage"] for record in records} == {"transformer"}
    other = (f"--config.pretrained_tokenizer={untrained}", *there[1:])
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path / "c", *other)
    assert code == 2 and "tokenizer" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "c").exists()
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "another"}))
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path / "b", *there)
    assert code == 2 and "other weights" in err


@pytest.mark.slow
def test_fine_tuning_the_decoder_keeps_tokens_and_transformer(untrained, tmp_path):
    training = {"decoder_only": "true", "steps": 3, "learning_rate": 0.1}
    flags = [f"--config.train_tokenizer.{name}={value}" for name, value in training.items()]
    start = f"--config.pretrained_tokenizer={untrained}", "--config.train_transformer.steps=0"
    code, out, err = run("train", "--config", TINY, "--workdir", tmp_path, *start, *flags)
    assert code == 0 and f"the tokenizer of {untrained} is fine-tuned" in out, err
    old, new = (load_models(folder) for folder in (untrained, tmp_path / "checkpoint"))
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    tokens = encode_images(old.tokenizer, images)
    np.testing.assert_array_equal(tokens, encode_images(new.tokenizer, images))
    assert (decode_tokens(old.tokenizer, tokens) != decode_tokens(new.tokenizer, tokens)).any()
    chex.assert_trees_all_equal(old.transformer, new.transformer)
    assert (old.class_names, old.sampling) == (new.class_names, new.sampling)


@pytest.mark.slow
def test_fine_tuning_begins_at_the_checkpoint_on_another_schedule(untrained, tmp_path):
    flags = (
        f"--config.pretrained_tokenizer={untrained}", "--config.train_transformer.steps=0",
        "--config.train_tokenizer.steps=1", "--config.train_tokenizer.learning_rate=0",
        "--config.tokenizer.patch_nums=1,2,4,8", "--config.data.size=32",
    )  # fmt: skip
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path, *flags)
    assert code == 0, err
    old, new = (load_tokenizer(folder) for folder in (untrained, tmp_path / "checkpoint"))
    assert new.config.image_size == 32
    np.testing.assert_array_equal(old.synthesis[...], new.synthesis[...])


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["metrics.jsonl", "tokenizer/8", "transformer/8", "checkpoint"])
def test_a_killed_run_ends_as_if_never_stopped(trained, tmp_path, seen):
    workdir = tmp_path / "work"
    process = start("train", "--config", TINY, "--workdir", workdir)
    wait_for(workdir / seen)  # before a save, between two, or while results are written
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (workdir / "summary.json").exists()
    code, _, err = run_alone("train", "--config", TINY, "--workdir", workdir)
    assert code == 0, err
    assert (workdir / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (workdir, trained))
    minutes = "minutes, this start"
    assert ours.pop(minutes) and theirs.pop(minutes) and ours == theirs


@pytest.mark.slow
def test_one_run_at_a_time_and_ctrl_c_saves_where_it_is(tmp_path):
    workdir = tmp_path / "work"
    flags = ("--config.train_tokenizer.steps=100000", "--config.every.save=90000")
    process = start("train", "--config", TINY, "--workdir", workdir, *flags)
    wait_for(workdir / "metrics.jsonl")
    code, _, said = run("train", "--config", TINY, "--workdir", workdir, *flags)
    assert code == 2 and f"another run is at work in {workdir}; name another --workdir" in said
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in err
    assert re.search(r"tokenizer: saved; the same command goes on from step \d+\n", err)
    saved = [int(p.name) for p in (workdir / "tokenizer").iterdir() if p.name.isdigit()]
    assert saved and max(saved) > 0
