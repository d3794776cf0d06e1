"""Images that are not square, from a config to samples, edits, tokens and back."""

import jax
import numpy as np
import pytest
from PIL import Image
from running import TINY, complaint, run

import var_jax
from var_jax.config import Config, from_dict
from var_jax.sampling.exports import build, load_parts, save_models
from var_jax.tools.configs import load_config
from var_jax.tools.npz import load_npz

FLAGS = "tokenizer.patch_nums=1,(1,2),(2,3),(4,6)", "data.size=16,24"
SILENT = "report=", "every.evaluate=0", "every.sample=0"  # what shows itself with square images
LENGTH = 1 + 2 + 6 + 24


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of random weights for images of 16 x 24 pixels."""
    config = from_dict(Config, load_config(str(TINY), FLAGS).to_dict())
    models = {"tokenizer": build(config.tokenizer), "transformer": build(config.transformer)}
    rng = np.random.default_rng(0)
    models = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), models)
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    save_models(folder, models, tuple("abcdefghi"), config)
    return folder


def test_a_model_of_oblong_images(wide):
    model = var_jax.load(wide)
    assert model.image_size == (16, 24) and model.patch_nums == (1, (1, 2), (2, 3), (4, 6))
    assert "16 x 24 px" in repr(model)
    image = model.crop(Image.new("RGB", (300, 100), "red"))
    assert image.shape == (16, 24, 3)
    tokens = model.encode(image)
    assert tokens.shape == (1, LENGTH)
    assert model.decode(tokens).shape == (1, 16, 24, 3)
    with pytest.raises(var_jax.BadInput, match=r"expected uint8 \(N, 16, 24, 3\)"):
        model.encode(np.zeros((1, 24, 16, 3), np.uint8))
    with pytest.raises(var_jax.BadInput, match=r"expected a mask of \(16, 24\) or a box"):
        model.edit(image, np.ones((24, 16), bool))


def test_oblong_checkpoints_have_no_counterpart_in_the_release(wide, tmp_path):
    sentence = complaint("convert", "--checkpoint", wide, "--to_torch", tmp_path / "out")
    assert "patch_nums=(1, (1, 2), (2, 3), (4, 6)) is not square" in sentence


def test_bad_oblong_flags(tmp_path):
    for flag, sentence in (
        ("data.size=16,16,3", "data.size=(16, 16, 3) must be an integer or a pair"),
        ("data.size=24,16", "give latents of 6 x 4"),
        ("train_transformer.batch_size=8,8", "batch_size=8,8; expected a whole number"),
        ("tokenizer.patch_nums=1,(4,6),(2,8)", "must start at 1 and never fall"),
    ):
        fields = [f"--config.{field}" for field in (*FLAGS, flag)]
        assert sentence in complaint("train", "--config", TINY, "--workdir", tmp_path, *fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["var", "raster", "dit"])
def test_it_trains_samples_edits_and_encodes(kind, tmp_path):
    fields = [*FLAGS, "train_tokenizer.steps=2", "train_transformer.steps=2"]
    if kind != "var":
        fields += ["tokenizer.patch_nums=((4,6),)", f"transformer.kind={kind}", *SILENT]
    if kind == "dit":
        fields += [
            "transformer.patch_size=2",
            "train_transformer.token_noise=0",
            "sampling.steps=2",
        ]
    flags = [f"--config.{field}" for field in fields]
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path / "run", *flags)
    assert code == 0, err
    checkpoint = "--checkpoint", tmp_path / "run/checkpoint"
    code, _, err = run("sample", *checkpoint, "--num", 9, "--out", tmp_path / "samples")
    assert code == 0, err
    samples = load_npz(tmp_path / "samples/samples.npz")
    assert samples["arr_0"].shape == (9, 16, 24, 3)
    if kind != "var":
        return
    assert samples["tokens"].shape == (9, LENGTH)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 60, 3), np.uint8)).save(photo)
    edit = "--image", photo, "--box", "0,0,.5,.5", "--out", tmp_path / "edited"
    code, _, err = run("edit", *checkpoint, *edit)
    assert code == 0, err
    edited = load_npz(tmp_path / "edited/edit.npz")
    assert edited["arr_0"].shape == (1, 16, 24, 3) and len(edited["keep"]) == LENGTH
    images = tmp_path / "samples/samples.npz"
    code, _, err = run("encode", *checkpoint, "--images", images, "--out", tmp_path / "codes")
    assert code == 0, err
    assert load_npz(tmp_path / "codes/tokens.npz")["tokens"].shape == (9, LENGTH)


@pytest.mark.slow
def test_a_square_model_is_fine_tuned_to_oblong_images(untrained, tmp_path):
    start = f"pretrained_tokenizer={untrained}", f"init_from={untrained}"
    schedule = "tokenizer.patch_nums=1,2,(4,6)", "data.size=16,24"
    steps = (
        "train_tokenizer.steps=1",
        "train_transformer.steps=1",
        "train_transformer.token_noise=0",
    )
    flags = [f"--config.{field}" for field in (*start, *schedule, *steps, *SILENT)]
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path, *flags)
    assert code == 0, err
    assert load_parts(tmp_path / "checkpoint")[0]["transformer"].pos_embed.shape[0] == 29


@pytest.mark.slow
def test_a_token_cache_of_oblong_images_serves_its_training(wide, tmp_path):
    out, cut = tmp_path / "tokens", ("--shift", 1, "--resize", 1.125)
    how = "--images", "emoji", "--out", out, *cut
    code, _, err = run("encode", "--checkpoint", wide, *how)
    assert code == 0, err
    fields = [
        *FLAGS, f"pretrained_tokenizer={wide}", "train_tokenizer.steps=0", f"data.tokens={out}",
        "train_transformer.steps=2", "train_transformer.token_noise=0", *SILENT,
    ]  # fmt: skip
    flags = [f"--config.{field}" for field in fields]
    code, _, err = run("train", "--config", TINY, "--workdir", tmp_path / "run", *flags)
    assert code == 0, err


@pytest.mark.slow
def test_sampling_at_another_schedule(wide, tmp_path):
    where = "--checkpoint", wide, "--num", 4, "--patch_nums"
    schedule = "1,(2,3),(3,4)"
    run("sample", *where, schedule, "--out", tmp_path)
    found = load_npz(tmp_path / "samples.npz")
    assert found["arr_0"].shape == (4, 12, 16, 3) and found["tokens"].shape == (4, 1 + 6 + 12)
    for text, sentence in (
        ("1,2.5", "--patch_nums=1,2.5; expected whole numbers or pairs"),
        ("1,(2,3", "--patch_nums=1,(2,3; expected whole numbers or pairs"),
        ("", "--patch_nums=; expected whole numbers or pairs"),
        ("1,(2,3,4)", "expected whole numbers or pairs"),
        ("2,4", "must start at 1 and never fall"),
    ):
        assert sentence in complaint("sample", *where, text, "--out", tmp_path / "bad")
        if "whole numbers" in sentence:
            weights = "--tokenizer", tmp_path / "none.pth", "--out", tmp_path / "bad"
            assert sentence in complaint("convert", *weights, "--patch_nums", text)
        assert not (tmp_path / "bad" / "samples.npz").exists()
