"""A train step learns, and computes the same on every mesh."""

import contextlib
import dataclasses
import functools
import types

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from var_jax.config import StageConfig, TokenizerConfig, TransformerConfig
from var_jax.models.tokenizer import to_float
from var_jax.models.var import Transformer
from var_jax.sharding.mesh import make_mesh, put_batch, shard
from var_jax.training.autoregressive import transformer_stage
from var_jax.training.optimizer import make_optimizer
from var_jax.training.state import apply_gradients, layout
from var_jax.training.tokenizer import loss_fn, tokenizer_stage

SIZES = dict(patch_nums=(1, 2, 4), vocab_size=64, latent_dim=16)
TOKENIZER = TokenizerConfig(
    **SIZES, channels=16, channel_mults=(1,), num_res_blocks=0, norm_groups=4, patch_size=4,
    skip=True,
)  # fmt: skip
TRANSFORMER = TransformerConfig(**SIZES, depth=2, width=64, num_heads=4, num_classes=9)
STAGE = StageConfig(steps=10, batch_size=16, learning_rate=1e-2, ema_decay=0.9)
TOKENIZER_STAGE = tokenizer_stage(TOKENIZER, STAGE)  # one each, so that jit knows them again
TRANSFORMER_STAGE = transformer_stage(TRANSFORMER, STAGE)


def data():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (16, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, 9, 16).astype(np.int32)}


def train(mesh_shape, stage, tokenizer=None, steps=5):
    """Loss and norm of the gradients of each step, and the last state, as NumPy."""
    mesh = make_mesh(*mesh_shape) if mesh_shape else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        key = jax.random.key(0)
        if mesh:
            abstract = shard(jax.eval_shape(stage.init, key), mesh, layout)
            places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            state = jax.jit(stage.init, out_shardings=places)(key)
            batch = put_batch(data(), mesh)
        else:
            state, batch = jax.jit(stage.init)(key), data()
        if tokenizer is not None:
            batch["tokenizer"] = jax.tree.map(jax.numpy.asarray, tokenizer)
        step, seen = jax.jit(stage.train_step), []
        for _ in range(steps):
            state, metrics = step(state, batch, key)
            seen.append([float(metrics[name]) for name in ("loss", "grad_norm")])
        return np.array(seen), jax.device_get(state)


@pytest.fixture(scope="module")
def alone():
    """Both stages without a mesh."""
    seen, state = train(None, TOKENIZER_STAGE)
    return seen, state, *train(None, TRANSFORMER_STAGE, state.best)


def test_both_stages_learn(alone):
    tokenizer_losses, transformer_losses = alone[0][:, 0], alone[2][:, 0]
    assert tokenizer_losses[-1] < 0.7 * tokenizer_losses[0]
    assert transformer_losses[-1] < transformer_losses[0] - 0.05
    assert transformer_losses[0] == pytest.approx(np.log(64), rel=0.01)  # uniform at the start


def test_a_step_keeps_types(alone):
    """Otherwise the second step is compiled anew."""
    types = lambda tree: [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]
    key, batch = jax.random.key(0), data() | {"tokenizer": alone[1].best}
    config = dataclasses.replace(STAGE, optimizer="muon")
    for stage in (TOKENIZER_STAGE, transformer_stage(TRANSFORMER, config)):
        state = jax.eval_shape(stage.init, key)
        after, _ = jax.eval_shape(stage.train_step, state, batch, key)
        assert types(after) == types(state)


def test_only_what_is_shown_counts_as_error():
    image = np.array([255, 255, 0, 0, 242], np.uint8).reshape(1, 5, 1, 1)
    made = np.array([1.3, 0.8, -1.3, -0.8, 1.3], np.float32).reshape(1, 5, 1, 1)

    def loss(made, image):
        codec = lambda _: (made, types.SimpleNamespace(loss=0.0))
        return loss_fn(codec, to_float(image))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(made, image)
    over = 1.3 - (242 / 127.5 - 1)
    assert value == pytest.approx((0.2**2 + 0.2**2 + over**2) / 5)
    np.testing.assert_allclose(gradient.ravel(), [0, -0.08, 0, 0.08, 0.4 * over], atol=1e-6)


@functools.cache
def compiled(model, stage):
    """One program for all tests that change no more than the batch."""
    stage = transformer_stage(
        dataclasses.replace(TRANSFORMER, **dict(model)), dataclasses.replace(STAGE, **dict(stage))
    )
    return jax.jit(stage.init), jax.jit(stage.train_step)


def first_step(alone, model=None, stage=None, **change):
    """Loss and norm of the gradients of one step, without chance but for what is asked."""
    model = {"drop_path": 0.0} | (model or {})
    stage = {"label_dropout": 0.0} | (stage or {})
    init, step = compiled(tuple(model.items()), tuple(stage.items()))
    batch = data() | change | {"tokenizer": jax.tree.map(jax.numpy.asarray, alone[1].best)}
    _, metrics = step(init(jax.random.key(0)), batch, jax.random.key(1))
    return np.array([metrics["loss"], metrics["grad_norm"]])


@pytest.mark.slow
def test_a_batch_in_parts_and_what_is_recomputed_change_nothing(alone):
    plain = first_step(alone)
    for change in (
        {"stage": {"accumulate": 2}},
        {"model": {"remat": "selective"}},
        {"model": {"remat": "full"}},
    ):
        np.testing.assert_allclose(first_step(alone, **change), plain, rtol=1e-5)


@pytest.mark.slow
def test_a_withheld_class_is_no_class(alone):
    nobody = np.full(16, TRANSFORMER.num_classes, np.int32)
    withheld = first_step(alone, stage={"label_dropout": 1.0})
    np.testing.assert_allclose(withheld, first_step(alone, label=nobody), rtol=1e-5)
    assert abs(withheld - first_step(alone)).max() > 1e-3


def test_dropped_layers_leave_the_mean():
    model = types.SimpleNamespace(config=dataclasses.replace(TRANSFORMER, drop_path=0.4))
    keep = np.asarray(Transformer.drop_path(model, jax.random.key(0), 20_000))[..., 0, 0]
    assert (keep[0] == 1).all()
    np.testing.assert_allclose(np.unique(keep[-1]), [0, 1 / 0.6], rtol=1e-6)
    np.testing.assert_allclose(keep[-1].mean(axis=-1), 1, atol=0.03)


def assert_moved_alike(stage, state, other):
    """Every leaf is off by less, in the mean, than a thousandth of how far it has moved."""
    start = jax.device_get(jax.jit(stage.init)(jax.random.key(0)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    for path, a, b, s in zip(paths, *map(jax.tree.leaves, (state, other, start)), strict=True):
        off, moved = abs(a - b).mean(), abs(a - s).mean()
        assert off <= 1e-3 * moved, path


SLOW = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 8, 1))]


@pytest.mark.parametrize("mesh_shape", [(2, 2, 2), *SLOW])
def test_meshes_agree(alone, mesh_shape):
    seen, state, more_seen, more_state = alone
    here, there = train(mesh_shape, TOKENIZER_STAGE)
    np.testing.assert_allclose(here, seen, rtol=1e-4)
    assert_moved_alike(TOKENIZER_STAGE, state, there)
    # Rematerialized layers are scanned, as they are on accelerators; those of `alone` are unrolled.
    scanned = dataclasses.replace(TRANSFORMER, remat="selective")
    here, there = train(mesh_shape, transformer_stage(scanned, STAGE), state.best)
    np.testing.assert_allclose(here, more_seen, rtol=1e-4)
    assert_moved_alike(TRANSFORMER_STAGE, more_state, there)


@pytest.mark.slow
def test_muon_updates_split_matrices_as_whole_ones():
    config = dataclasses.replace(STAGE, optimizer="muon", learning_rate=16.0)  # 1 for a batch of 16
    init, mesh = transformer_stage(TRANSFORMER, config).init, make_mesh(2, 2, 2)

    @jax.jit
    def update(state):
        gradients = jax.tree.map(lambda x: jax.numpy.sin(1e3 * x), state.model)
        return apply_gradients(state, gradients, make_optimizer(config))

    before = jax.jit(init)(jax.random.key(0))
    wanted = update(before)
    assert np.std(wanted.model.blocks.fc1[...] - before.model.blocks.fc1[...]) > 0.1
    with jax.set_mesh(mesh):
        places = jax.tree.map(
            lambda leaf: leaf.sharding,
            shard(jax.eval_shape(init, jax.random.key(0)), mesh, layout),
        )
        found = update(jax.device_put(before, places))
    same = lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, found, places)))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), atol=1e-3)


def test_weights_and_moments_are_sharded_from_the_start():
    mesh = make_mesh(2, 2, 2)
    stage = TRANSFORMER_STAGE
    abstract = shard(jax.eval_shape(stage.init, jax.random.key(0)), mesh, layout)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    sharded = [name for name, spec in specs.items() if name.endswith("blocks.fc1.value")]
    assert len(sharded) == 4  # weights, average, two moments
    assert all(specs[name] == P(None, "fsdp", "tensor") for name in sharded)


@pytest.mark.parametrize("at_once", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_cached_tokens_give_the_same_loss_as_pixels(alone, at_once, monkeypatch):
    if at_once:  # images encoded in parts
        monkeypatch.setattr(TokenizerConfig, "images_at_a_time", at_once)
    tokenizer = alone[1].best
    stage = TRANSFORMER_STAGE
    state = jax.jit(stage.init)(jax.random.key(0))
    frozen = jax.tree.map(jax.numpy.asarray, tokenizer)
    pixels = data() | {"tokenizer": frozen}
    tokens = jax.jit(lambda t, x: t.encode(x / 127.5 - 1))(frozen, data()["image"].astype("f4"))
    cached = {"tokens": tokens, "label": data()["label"], "tokenizer": frozen}
    step = jax.jit(stage.train_step)
    losses = [float(step(state, batch, jax.random.key(1))[1]["loss"]) for batch in (pixels, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
