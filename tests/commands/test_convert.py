"""`convert` and `encode`, on the golden weights as PyTorch files."""

import contextlib
import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import load, models, state_dict
from running import TINY, run

from var_jax import convert as command
from var_jax.checkpoints.torch.convert import open_tensors, write_models
from var_jax.checkpoints.torch.names import buffers
from var_jax.checkpoints.torch.pth import write_pth
from var_jax.checkpoints.torch.safetensors import write_safetensors
from var_jax.config import Config, from_dict
from var_jax.models.tokenizer import Tokenizer, encode_images, to_float
from var_jax.sampling.exports import load_models, load_tokenizer, save_models
from var_jax.sharding.mesh import make_mesh
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.training.tokenizer import tokenizer_task


def convert(*flags):
    """Exit code, stdout and stderr of `convert`, in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = cli.call(command.main, command.define_flags, list(map(str, flags)))
    return code, out.getvalue(), err.getvalue()


def read(path):
    return {name: np.asarray(tensor) for name, tensor in open_tensors(path).items()}


def state(part):
    """All that PyTorch saves of a part of the case "base", buffers included."""
    config = json.loads(str(load("base")["config"]))
    tensors = state_dict("base", part, config[f"weights_seed_{part}"])
    derived = buffers(models("base")[part == "transformer"])
    if part == "tokenizer":
        derived = {name: array + 0.5 for name, array in derived.items()}  # usage of the codes
    return tensors | derived


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The case "base" as a .pth and a .safetensors file."""
    folder = tmp_path_factory.mktemp("torch")
    write_pth(folder / "tokenizer.pth", state("tokenizer"))
    write_safetensors(folder / "transformer.safetensors", state("transformer"))
    return folder / "tokenizer.pth", folder / "transformer.safetensors"


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    """Its checkpoint."""
    out = tmp_path_factory.mktemp("converted") / "base"
    code, said, err = convert("--tokenizer", files[0], "--transformer", files[1], "--out", out)
    assert code == 0, err
    assert "a transformer of 0.3 M float32 (depth 4, 10 classes)" in said
    return out


def test_the_checkpoint_holds_the_weights(converted):
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    models_read = load_models(str(converted), mesh)
    assert models_read.class_names == tuple("0123456789")
    for ours, wanted in zip(models_read[:2], models("base")[:2], strict=True):
        for leaf, golden in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(leaf, golden)
    config, golden = models_read.transformer.config, models("base")[1].config
    assert (config.patch_nums, config.num_heads) == (golden.patch_nums, golden.num_heads)


@pytest.mark.slow
def test_sampling_gives_the_tokens_of_the_release(converted, tmp_path):
    gold = load("base")
    labels, cfg = ",".join(map(str, gold["labels"])), json.loads(str(gold["config"]))["cfg"]
    flags = ("--labels", labels, "--cfg", cfg, "--top_k", 1, "--batch_size", 2, "--out", tmp_path)
    code, _, err = run("sample", "--checkpoint", converted, *flags)
    assert code == 0, err
    with np.load(tmp_path / "samples.npz") as found:
        np.testing.assert_array_equal(found["tokens"], gold["greedy_tokens"])
        image = 255 * gold["greedy_image"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found["arr_0"], image, atol=0.51)


def test_use_of_the_codes_at_another_schedule_is_left_out(tmp_path):
    """PyTorch would refuse a file whose buffer has another shape; unused codes it takes."""
    tokenizer = models("base")[0]
    name, own = next(iter(buffers(tokenizer).items()))
    for scales, kept in ((len(own), True), (len(own) + 1, False)):
        usage = {name: np.ones((scales, own.shape[1]), own.dtype)}
        paths, _ = write_models({"tokenizer": tokenizer}, usage, tmp_path)
        np.testing.assert_array_equal(read(paths["tokenizer"])[name], usage[name] if kept else own)


def test_back_to_torch_is_bit_identical(converted, tmp_path):
    code, said, err = convert("--checkpoint", converted, "--to_torch", tmp_path)
    assert code == 0, err
    assert "VAR(vae, num_classes=10, depth=4, embed_dim=64, num_heads=4" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.pth", "transformer.pth"]
    for part in ("tokenizer", "transformer"):
        same(read(tmp_path / f"{part}.pth"), state(part))


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.slow
def test_half_precision_and_a_tokenizer_alone(tmp_path):
    half = {name: array.astype(np.float16) for name, array in state("tokenizer").items()}
    write_pth(tmp_path / "t.pth", half)
    out, back = tmp_path / "out", tmp_path / "back"
    flags = ("--tokenizer", tmp_path / "t.pth", "--patch_nums", "1,2,3,4", "--out", out)
    code, said, err = convert(*flags)
    assert code == 0, err
    assert "float16 (64 px, 64 codes)" in said
    flags = ("--checkpoint", out, "--to_torch", back, "--format", "safetensors")
    code, _, err = convert(*flags)
    assert code == 0, err
    same(read(back / "tokenizer.safetensors"), half)
    code, _, err = run("sample", "--checkpoint", out, "--num", 1, "--out", tmp_path / "s")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "holds a tokenizer but no transformer" in err and not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_tokenizer_trained_with_every_option_is_one_of_the_release(tmp_path):
    fields = (
        "tokenizer.patch_nums=1,1,1,2", "tokenizer.channels=32",
        "tokenizer.channel_mults=1,1,2,2,4", "tokenizer.num_res_blocks=2",
        "tokenizer.norm_groups=32", "tokenizer.patch_size=1", "data.size=32",
        "train_tokenizer.kmeans_steps=1", "train_tokenizer.rotation=true",
        "train_tokenizer.scale_dropout=0.5", "train_tokenizer.perturbation=0.5",
        "train_tokenizer.restart_by_scale=true", "train_tokenizer.l1_weight=0.2",
        "train_tokenizer.gan.weight=0.5", "train_tokenizer.gan.layers=1",
        "train_tokenizer.gan.start=1", "train_tokenizer.gan.lecam=0.01",
        "train_tokenizer.gan.augment=true",
        "train_tokenizer.ema_decay=0",
    )  # fmt: skip
    config = from_dict(Config, load_config(str(TINY), fields))
    task, key = tokenizer_task(config.tokenizer, config.train_tokenizer), jax.random.key(0)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    rng, quick = np.random.default_rng(1), {"xla_backend_optimization_level": 0}  # to compile
    jit = functools.partial(jax.jit, compiler_options=quick)

    def start(path, leaf):  # initialising them as usual would compile for 20 s
        spread = 0.1 if ".params" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(0, spread, leaf.shape), leaf.dtype)

    state = jax.tree_util.tree_map_with_path(start, jax.eval_shape(task.init, key))
    step, weights = jit(task.train_step), []
    for _ in range(2):  # the first one is of k-means
        state, metrics = step(state, {"image": images}, {}, key)
        weights.append(metrics["adversarial_weight"])
    assert np.isnan(weights[0]) and weights[1] > 0  # the discriminator waits for a step
    trained, torch, back = (tmp_path / name for name in ("trained", "torch", "back"))
    save_models(trained, {"tokenizer": state.autoencoder.params}, (), config)
    code, said, err = convert("--checkpoint", trained, "--to_torch", torch)
    assert code == 0, err
    flags = ("--tokenizer", torch / "tokenizer.pth", "--patch_nums", "1,1,1,2", "--out", back)
    code, said, err = convert(*flags)
    assert code == 0 and "(32 px, 64 codes)" in said, err
    ours, theirs = (load_tokenizer(folder) for folder in (trained, back))
    assert dataclasses.replace(theirs.config, num_phi=ours.config.num_phi) == ours.config
    encode = jit(encode_images)
    tokens = encode(ours, images)
    assert len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(encode(theirs, images), tokens)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_release_cannot_express(tmp_path):
    code, said, err = convert("--checkpoint", "emoji", "--to_torch", tmp_path)
    assert code == 0
    assert "tokenizer.patch_size=8 has no counterpart in the PyTorch release" in err
    assert [path.name for path in tmp_path.iterdir()] == ["transformer.pth"]
    assert "VAR(vae, num_classes=9" in said


def test_a_wrong_tensor(files, tmp_path):
    wrong = tmp_path / "wrong.pth"
    write_pth(wrong, state("transformer") | {"extra": np.zeros(3, np.float32)})
    flags = ("--tokenizer", files[0], "--transformer", wrong, "--out", tmp_path / "out")
    code, said, err = run("convert", *flags)
    assert (code, said, len(err.splitlines())) == (2, "", 1)
    assert err == f"error: {wrong}: tensor 'extra' is surplus: a model of these sizes has none.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.pth"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--tokenizer {transformer} --transformer {tokenizer} --out x", "holds a tokenizer"),
        ("--tokenizer no.pth --out x", "no.pth cannot be read"),
        ("--tokenizer {tokenizer} --checkpoint x", "found --checkpoint, --tokenizer"),
    ],
)
def test_wrong_flags(files, tmp_path, flags, sentence):
    given = dict(zip(("tokenizer", "transformer"), files, strict=True))
    flags = flags.replace(" x", f" {tmp_path / 'x'}").format(**given)
    code, _, err = convert(*flags.split())
    assert (code, len(err.splitlines())) == (2, 1) and sentence in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_encode(converted, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    flags = ("--checkpoint", converted, "--out", tmp_path / "tokens", "--batch_size", 2)
    code, _, err = run("encode", "--images", tmp_path / "images.npz", *flags)
    assert code == 0, err
    with np.load(tmp_path / "tokens" / "tokens.npz") as found:
        assert found["tokens"].dtype == np.int32
        expected = jax.jit(Tokenizer.encode)(models("base")[0], to_float(jnp.asarray(images)))
        np.testing.assert_array_equal(found["tokens"], expected)
    np.savez(tmp_path / "images.npz", arr_0=images[:, :32])
    code, _, err = run("encode", "--images", tmp_path / "images.npz", *flags)
    assert code == 2 and "holds images of 32 x 64 pixels; the tokenizer of" in err
