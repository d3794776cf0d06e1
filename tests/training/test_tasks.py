"""A train step learns, and computes the same on every mesh."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from var_jax.config import (
    TokenizerConfig,
    TrainTokenizerConfig,
    TrainTransformerConfig,
    TransformerConfig,
)
from var_jax.models import backend
from var_jax.models.blocks import drop_path
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.tokenizer import encode
from var_jax.models.var import likeliest
from var_jax.sharding.mesh import make_mesh, put_batch, shard
from var_jax.tools.flops import transformer_flops
from var_jax.training.autoregressive import autoregressive_task, targets_and_inputs, token_noise
from var_jax.training.diffusion import diffusion_task
from var_jax.training.optimizer import learning_rate
from var_jax.training.tokenizer import tokenizer_task

SIZES = dict(patch_nums=(1, 2, 4), vocab_size=64, latent_dim=16)
TOKENIZER = TokenizerConfig(
    **SIZES, channels=16, channel_mults=(1,), num_res_blocks=0, norm_groups=4, patch_size=4
)
TRANSFORMER = TransformerConfig(**SIZES, depth=2, width=64, num_heads=4, num_classes=9)
TRAIN = dict(steps=10, batch_size=16, learning_rate=1e-2, ema_decay=0.9)
TRAIN_TOKENIZER = TrainTokenizerConfig(**TRAIN)
TRAIN_TRANSFORMER = TrainTransformerConfig(**TRAIN)
TOKENIZER_TASK = tokenizer_task(TOKENIZER, TRAIN_TOKENIZER)  # one each, so that jit knows them
TRANSFORMER_TASK = autoregressive_task(TRANSFORMER, TRAIN_TRANSFORMER)


def data():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (16, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, 9, 16).astype(np.int32)}


def train(mesh_shape, task, tokenizer=None, steps=5, images=16, **frozen):
    """Loss and norm of the gradients of each step, and the last state, as NumPy."""
    mesh = make_mesh(*mesh_shape) if mesh_shape else None
    here = jax.tree.map(lambda x: x[:images], data())
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        key = jax.random.key(0)
        if mesh:
            abstract = shard(jax.eval_shape(task.init, key), mesh, task.layout)
            places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            state = jax.jit(task.init, out_shardings=places)(key)
            batch = put_batch(here, mesh)
        else:
            state, batch = jax.jit(task.init)(key), here
        frozen |= {} if tokenizer is None else {"tokenizer": tokenizer}
        frozen = jax.tree.map(jnp.asarray, frozen)
        step, seen = jax.jit(task.train_step), []
        for _ in range(steps):
            state, metrics = step(state, batch, frozen, key)
            seen.append([float(metrics[name]) for name in ("loss", "grad_norm")])
        return np.array(seen), jax.device_get(state)


@pytest.fixture(scope="module")
def alone():
    """Both trainings without a mesh."""
    seen, state = train(None, TOKENIZER_TASK)
    return seen, state, *train(None, TRANSFORMER_TASK, state.autoencoder.best)


@pytest.mark.slow
def test_both_tasks_learn(alone):
    tokenizer_losses, transformer_losses = alone[0][:, 0], alone[2][:, 0]
    assert tokenizer_losses[-1] < 0.7 * tokenizer_losses[0]
    assert transformer_losses[-1] < transformer_losses[0] - 0.05
    assert transformer_losses[0] == pytest.approx(np.log(64), rel=0.01)  # uniform at the start


@pytest.mark.slow
def test_the_rate_that_is_logged_is_the_optimizers(alone):
    """It counts no skipped steps: here five were made of nine."""
    pairs = (TOKENIZER_TASK, alone[1], {}), (TRANSFORMER_TASK, alone[3], {"tokenizer": alone[1]})
    for task, state, frozen in pairs:
        frozen = {name: jax.tree.map(jnp.asarray, f.autoencoder.best) for name, f in frozen.items()}
        state = jax.tree.map(jnp.asarray, state)._replace(step=jnp.int32(9))
        _, metrics = jax.jit(task.train_step)(state, data(), frozen, jax.random.key(0))
        rate = learning_rate(task.config)
        assert metrics["learning_rate"] == pytest.approx(rate(5)) != pytest.approx(rate(9))


@pytest.mark.slow
def test_a_step_keeps_types(alone):
    """Otherwise the second step is compiled anew."""
    types = lambda tree: [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]
    key, frozen = jax.random.key(0), {"tokenizer": alone[1].autoencoder.best}
    noisy = dataclasses.replace(TRAIN_TRANSFORMER, token_noise=0.2, lr_scale="head=0.5")
    for task in (TOKENIZER_TASK, autoregressive_task(TRANSFORMER, noisy)):
        state = jax.eval_shape(task.init, key)
        after, _ = jax.eval_shape(task.train_step, state, data(), frozen, key)
        assert types(after) == types(state)


@functools.cache
def compiled(model, training):
    """One program for all tests that change no more than the batch."""
    task = autoregressive_task(
        dataclasses.replace(TRANSFORMER, **dict(model)),
        dataclasses.replace(TRAIN_TRANSFORMER, **dict(training)),
    )
    return jax.jit(task.init), jax.jit(task.train_step)


def first_step(alone, model=None, training=None, **change):
    """Loss and norm of the gradients of one step, without chance but for what is asked."""
    model = {"drop_path": 0.0} | (model or {})
    training = {"label_dropout": 0.0} | (training or {})
    init, step = compiled(tuple(model.items()), tuple(training.items()))
    frozen = {"tokenizer": jax.tree.map(jnp.asarray, alone[1].autoencoder.best)}
    state, key = init(jax.random.key(0)), jax.random.key(1)
    _, metrics = step(state, data() | change, frozen, key)
    return np.array([metrics["loss"], metrics["grad_norm"]])


@pytest.mark.slow
def test_a_batch_in_parts_and_what_is_recomputed_change_nothing(alone, monkeypatch):
    plain = first_step(alone)
    for change in (
        {"training": {"accumulate": 2}},
        {"model": {"remat": "selective"}},
        {"model": {"remat": "full"}},
    ):
        np.testing.assert_allclose(first_step(alone, **change), plain, rtol=1e-5)
    monkeypatch.setattr(backend, "unrolls", lambda depth, remat: remat != "full")  # as on TPUs
    monkeypatch.setattr(backend, "whole_parts", lambda: True)
    np.testing.assert_allclose(first_step(alone, model={"remat": "selective"}), plain, rtol=1e-5)


@pytest.mark.slow
def test_a_withheld_class_is_no_class(alone):
    no_class = np.full(16, TRANSFORMER.num_classes, np.int32)
    withheld = first_step(alone, training={"label_dropout": 1.0})
    np.testing.assert_allclose(withheld, first_step(alone, label=no_class), rtol=1e-5)
    assert abs(withheld - first_step(alone)).max() > 1e-3


@pytest.mark.slow
def test_an_encoder_in_bfloat16_is_of_the_step_and_not_of_the_validation():
    convolutions = dataclasses.replace(TOKENIZER, patch_size=1, channel_mults=(1, 1, 1))
    tokenizer = make_tokenizer(convolutions, rngs=nnx.Rngs(0))
    frozen, key = {"tokenizer": tokenizer}, jax.random.key(0)
    for kind, task in (("var", autoregressive_task), ("dit", diffusion_task)):
        for dtype in ("float32", "bfloat16"):
            config = dataclasses.replace(TRAIN_TRANSFORMER, encoder_dtype=dtype)
            made = task(dataclasses.replace(TRANSFORMER, kind=kind), config)
            state = jax.eval_shape(made.init, key)
            step = str(jax.make_jaxpr(made.train_step)(state, data(), frozen, key))
            check = str(jax.make_jaxpr(made.eval_step)(state, data(), frozen))
            assert ("bf16[" in step) == (dtype == "bfloat16")
            assert "bf16[" not in check


@pytest.mark.slow
def test_an_encoder_in_bfloat16_changes_a_few_tokens():
    convolutions = dataclasses.replace(TOKENIZER, patch_size=1, channel_mults=(1, 1, 1))
    tokenizer = make_tokenizer(convolutions, rngs=nnx.Rngs(0))
    image = jnp.asarray(np.random.default_rng(1).integers(0, 255, (64, 16, 16, 3)), jnp.uint8)
    exact, rounded = (encode(tokenizer, image, dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    assert 0 < (exact != rounded).mean() < 0.05


@pytest.mark.slow
def test_student_forcing_adds_its_loss_to_the_first_pass(alone):
    """By hand: the model's own greedy tokens, read and predicted; scale 1 does not count."""
    weight = 0.5
    task = autoregressive_task(
        dataclasses.replace(TRANSFORMER, drop_path=0.0),
        dataclasses.replace(TRAIN_TRANSFORMER, label_dropout=0.0, student_forcing=weight),
    )
    tokenizer = jax.tree.map(jnp.asarray, alone[1].autoencoder.best)
    state = jax.tree.map(jnp.asarray, train(None, task, tokenizer)[1])
    transformer, batch = state.transformer.params, jax.tree.map(jnp.asarray, data())
    frozen = {"tokenizer": tokenizer}
    _, metrics = jax.jit(task.train_step)(state, batch, frozen, jax.random.key(1))

    def by_hand(transformer):
        tokens, inputs = targets_and_inputs(transformer, batch, frozen)
        logits = transformer(batch["label"], inputs)
        own = jax.lax.stop_gradient(logits.argmax(-1))
        again = transformer(batch["label"], tokenizer.quantizer.teacher_forcing_inputs(own))
        entropy = lambda logits, tokens: optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens
        )
        return entropy(logits, tokens).mean() + weight * entropy(again, own)[:, 1:].mean()

    loss, gradient = jax.jit(jax.value_and_grad(by_hand))(transformer)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert task.image_flops(1) == 2 * transformer_flops(TRANSFORMER)


@pytest.mark.slow
def test_student_forcing_and_a_window_on_a_mesh(alone):
    task = autoregressive_task(
        dataclasses.replace(TRANSFORMER, window=2),
        dataclasses.replace(TRAIN_TRANSFORMER, student_forcing=0.5),
    )
    plain, state = train(None, task, alone[1].autoencoder.best)
    sharded, other = train((2, 2, 2), task, alone[1].autoencoder.best)
    np.testing.assert_allclose(sharded, plain, rtol=1e-3)
    assert_moved_alike(task, other, state)


def test_the_likeliest_code_is_the_first_of_equals():
    logits = jax.random.normal(jax.random.key(0), (3, 7, 50)).round(1)
    np.testing.assert_array_equal(likeliest(logits), logits.argmax(-1))


def test_dropped_layers_leave_the_mean():
    config = dataclasses.replace(TRANSFORMER, drop_path=0.4)
    keep = np.asarray(drop_path(config, jax.random.key(0), 20_000))[..., 0, 0]
    assert (keep[0] == 1).all()
    np.testing.assert_allclose(np.unique(keep[-1]), [0, 1 / 0.6], rtol=1e-6)
    np.testing.assert_allclose(keep[-1].mean(axis=-1), 1, atol=0.03)


def test_token_noise_replaces_up_to_its_share():
    noise = np.asarray(token_noise(jax.random.key(0), (4000, 50), 0.4, 64))
    share = (noise >= 0).mean(axis=1)
    assert share.mean() == pytest.approx(0.2, abs=0.01) and share.max() > 0.35
    assert share.min() < 0.05 and set(np.unique(noise)) == set(range(-1, 64))


@pytest.mark.slow
def test_noise_changes_what_is_read_and_not_what_is_predicted(alone):
    """Finer scales make up for a wrong code: what is predicted after it is another residual."""
    tokenizer = jax.tree.map(jnp.asarray, alone[1].autoencoder.best)
    latent = jax.random.normal(jax.random.key(0), (3, 4, 4, 16))
    plain = tokenizer.quantizer.encode(latent)
    noise = jnp.full((3, 21), -1).at[:, 2].set((plain.idx[:, 2] + 1) % 64)
    noisy = tokenizer.quantizer.encode(latent, noise)
    np.testing.assert_array_equal(noisy.idx[:, :5], plain.idx[:, :5])
    np.testing.assert_array_equal(noisy.used[:, 2], noise[:, 2])
    keep = np.arange(21) != 2
    np.testing.assert_array_equal(noisy.used[:, keep], noisy.idx[:, keep])
    assert (noisy.idx[:, 5:] != plain.idx[:, 5:]).any()


@pytest.mark.slow
def test_restarted_codes_replace_their_averages():
    task = tokenizer_task(TOKENIZER, dataclasses.replace(TRAIN_TOKENIZER, ema_decay=0.999))
    state = jax.jit(task.init)(jax.random.key(0))
    step = jax.jit(task.train_step)
    restarted = 0
    for _ in range(30):
        state, metrics = step(state, data(), {}, jax.random.key(0))
        restarted = metrics["codes_restarted"]
        if restarted:
            break
    learner = jax.device_get(state.autoencoder)
    new, average = (tree.quantizer.codebook[...] for tree in (learner.params, learner.ema))
    same = (np.asarray(new) == np.asarray(average)).all(axis=1).sum()
    assert same >= int(restarted) > 0


def assert_moved_alike(task, state, other):
    """Every leaf is off by less, in the mean, than a thousandth of how far it has moved."""
    start = jax.device_get(jax.jit(task.init)(jax.random.key(0)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    for path, a, b, s in zip(paths, *map(jax.tree.leaves, (state, other, start)), strict=True):
        off, moved = abs(a - b).mean(), abs(a - s).mean()
        assert off <= 1e-3 * moved, path


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1)])
def test_meshes_agree(alone, mesh_shape):
    seen, state, more_seen, more_state = alone
    here, there = train(mesh_shape, TOKENIZER_TASK)
    np.testing.assert_allclose(here, seen, rtol=1e-4)
    assert_moved_alike(TOKENIZER_TASK, state, there)
    # Rematerialized layers are scanned, as they are on GPUs; those of `alone` are unrolled.
    scanned = dataclasses.replace(TRANSFORMER, remat="selective")
    task = autoregressive_task(scanned, TRAIN_TRANSFORMER)
    here, there = train(mesh_shape, task, state.autoencoder.best)
    np.testing.assert_allclose(here, more_seen, rtol=1e-4)
    assert_moved_alike(TRANSFORMER_TASK, more_state, there)


def test_weights_and_moments_are_sharded_from_the_start():
    mesh, task = make_mesh(2, 2, 2), TRANSFORMER_TASK
    abstract = shard(jax.eval_shape(task.init, jax.random.key(0)), mesh, task.layout)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    sharded = [name for name, spec in specs.items() if name.endswith("blocks.fc1.value")]
    assert len(sharded) == 4  # weights, average, two moments
    assert all(specs[name] == P(None, "fsdp", "tensor") for name in sharded)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 3])
def test_cached_tokens_give_the_same_loss_as_images(alone, at_once, monkeypatch):
    if at_once:  # images encoded in parts, the last of them padded
        monkeypatch.setattr(TokenizerConfig, "images_at_a_time", at_once)
    task = TRANSFORMER_TASK
    state = jax.jit(task.init)(jax.random.key(0))
    frozen = {"tokenizer": jax.tree.map(jnp.asarray, alone[1].autoencoder.best)}
    encode = jax.jit(lambda t, x: t.encode(x / 127.5 - 1))
    tokens = encode(frozen["tokenizer"], data()["image"].astype("f4"))
    cached = {"tokens": tokens, "label": data()["label"]}
    step, key = jax.jit(task.train_step), jax.random.key(1)
    losses = [float(step(state, batch, frozen, key)[1]["loss"]) for batch in (data(), cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_bfloat16_agrees_with_float32(alone):
    """As accelerators compute it: the loss to half a percent, gradients in the same direction."""
    frozen = {"tokenizer": jax.tree.map(jnp.asarray, alone[1].autoencoder.best)}
    training = dataclasses.replace(TRAIN_TRANSFORMER, label_dropout=0.0)
    losses, moved = [], []
    for dtype in ("float32", "bfloat16"):
        task = autoregressive_task(dataclasses.replace(TRANSFORMER, dtype=dtype), training)
        state = jax.jit(task.init)(jax.random.key(0))
        after, metrics = jax.jit(task.train_step)(state, data(), frozen, jax.random.key(1))
        losses.append(float(metrics["loss"]))
        mu = after.transformer.opt_state[1].mu
        moved.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mu)]))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    cosine = moved[0] @ moved[1] / np.linalg.norm(moved[0]) / np.linalg.norm(moved[1])
    assert cosine > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_a_rate_of_0_freezes_the_codebook_too(decay):
    config = dataclasses.replace(TRAIN_TOKENIZER, lr_scale=".*=0", codebook_decay=decay)
    task = tokenizer_task(TOKENIZER, config)
    start = jax.jit(task.init)(jax.random.key(0)).autoencoder.params
    end = train(None, task, steps=2)[1].autoencoder.params
    jax.tree.map(np.testing.assert_array_equal, start, end)
