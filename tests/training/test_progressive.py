"""Progressive training: the coarse scales are trained first, as the full loss would train them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_tasks import TOKENIZER, TRAIN_TRANSFORMER, TRANSFORMER, assert_moved_alike, data, train

from var_jax import BadInput
from var_jax.config import Config, EveryConfig, TrainTransformerConfig, from_dict
from var_jax.data.pipeline import batches
from var_jax.data.sources.emoji import Emoji
from var_jax.models.patch_codec import make_tokenizer
from var_jax.schedule import PATCH_NUMS_256, stages
from var_jax.sharding.mesh import make_mesh
from var_jax.tools.flops import flops_by_part, training_totals, transformer_flops
from var_jax.tools.logs import Metrics, read_metrics
from var_jax.training import loop
from var_jax.training.autoregressive import autoregressive_task, targets_and_inputs
from var_jax.training.losses import cross_entropy_metrics

SMALL = dict(depth=1, width=32, num_heads=2, drop_path=0.0)
MODEL = dataclasses.replace(TRANSFORMER, **SMALL)  # of 1, 4 and 16 tokens
CONFIG = dataclasses.replace(
    TRAIN_TRANSFORMER, steps=20, progressive=0.5, label_dropout=0.0, clip_norm=0.0
)
BOUNDARY, WARMUP = 10, 2
TASK = autoregressive_task(MODEL, CONFIG)
LATER = ("pos_embed", "level_embed"), (5, 2)  # weights of the last scale begin there


@pytest.mark.parametrize(
    ("num_scales", "share", "steps", "expected"),
    [
        (10, 0.0, 100, [(10, 0, 0)]),
        (3, 0.5, 20, [(2, 0, 0), (3, 10, 2)]),
        (4, 0.4, 100, [(2, 0, 0), (3, 20, 4), (4, 40, 4)]),
        (10, 0.5, 1000, [(5, 0, 0), *((5 + i, 100 * i, 20) for i in range(1, 6))]),
        (1, 0.5, 100, [(1, 0, 0)]),
    ],
)
def test_stages(num_scales, share, steps, expected):
    assert list(stages(num_scales, share, steps)) == expected


def weights(abstract):
    """Random ones, for which nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), abstract)


@functools.cache
def frozen():
    """A tokenizer."""
    abstract = jax.eval_shape(lambda: make_tokenizer(TOKENIZER, rngs=nnx.Rngs(0)))
    return {"tokenizer": weights(abstract)}


@functools.cache
def compiled():
    """The state before training, and the step."""
    state = jax.tree.map(jnp.zeros_like, jax.eval_shape(TASK.init, jax.random.key(0)))
    params = weights(state.transformer.params)
    learner = state.transformer._replace(params=params, ema=params)
    return state._replace(transformer=learner), jax.jit(TASK.train_step)


def step_at(step):
    """Metrics and state after a step from the first weights, taken for this step."""
    state, run = compiled()
    return run(state._replace(step=jnp.int32(step)), data(), frozen(), jax.random.key(1))


@jax.jit
def full(transformer, batch, frozen, weight):
    """The loss over all scales, of which tokens count by weight; its gradient; the metrics."""

    def loss(transformer):
        tokens, inputs = targets_and_inputs(transformer, batch, frozen)
        logits = transformer(batch["label"], inputs)
        loss, metrics = cross_entropy_metrics(logits, tokens, MODEL.patch_nums, 0.0, weight)
        return loss.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(transformer)
    return value, jax.tree.map(jnp.mean, metrics), gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "of_last"),
    [(0, 0.0), (BOUNDARY - 1, 0.0), (BOUNDARY, 0.5), (BOUNDARY + 1, 1.0), (19, 1.0)],
)
def test_the_loss_of_a_stage_is_the_full_loss_of_its_scales(step, of_last):
    weight = jnp.array([1.0] * 5 + [of_last] * 16)
    value, expected, gradient = full(compiled()[0].transformer.params, data(), frozen(), weight)
    state, metrics = step_at(step)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    moment = state.transformer.opt_state[1].mu  # (1 - b1) times the first gradient
    chex.assert_trees_all_close(moment, jax.tree.map(lambda g: 0.1 * g, gradient), atol=1e-6)
    for name, figure in expected.items():
        untrained = name.endswith("last") and not of_last
        if name != "accuracy" or of_last:
            wanted = np.nan if untrained else float(figure)
            assert metrics[name] == pytest.approx(wanted, rel=1e-5, nan_ok=True), name


def run(directory, until=None):
    """Trains on emoji; a hook ends it at a step, as a full disk would."""

    def stop(step, state):
        if step == until:
            raise OSError
        return {}

    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = loop.run(
            TASK, batches(Emoji("train", 16), batch_size=16, seed=0), mesh=mesh, seed=0,
            directory=directory / "checkpoints", metrics=Metrics(directory), frozen=frozen(),
            every=EveryConfig(log=1, save=2), hooks=(loop.Hook("stop", 1, stop),),
        )  # fmt: skip
        return jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("until", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
def test_resuming_across_a_boundary_equals_never_having_stopped(tmp_path, until):
    whole = run(tmp_path / "whole")
    with pytest.raises(OSError):
        run(tmp_path / "resumed", until)
    chex.assert_trees_all_equal(whole, run(tmp_path / "resumed"))
    records = [r for r in read_metrics(tmp_path / "whole") if "loss" in r]
    assert ["loss_last" in r for r in records] == [False] * BOUNDARY + [True] * BOUNDARY


@pytest.mark.slow
def test_weights_of_a_scale_wait_for_its_stage():
    start, step = compiled()
    state = start
    for _ in range(BOUNDARY):
        state, _ = step(state, data(), frozen(), jax.random.key(1))
    for name, first in zip(*LATER, strict=True):
        before, after = (getattr(s.transformer.params, name)[...] for s in (start, state))
        np.testing.assert_array_equal(after[first:], before[first:])
        assert (after[:first] != before[:first]).any(axis=1).all()
    state, _ = step(state, data(), frozen(), jax.random.key(1))
    assert (state.transformer.params.pos_embed[5:] != start.transformer.params.pos_embed[5:]).all()


@pytest.mark.slow
def test_a_mesh_agrees():
    alone, state = train(None, TASK, frozen()["tokenizer"], steps=BOUNDARY + 3)
    here, there = train((2, 2, 2), TASK, jax.device_get(frozen()["tokenizer"]), BOUNDARY + 3)
    np.testing.assert_allclose(here, alone, rtol=1e-4)
    assert_moved_alike(TASK, state, there)


def test_operations_are_those_of_the_stages():
    small = dataclasses.replace(MODEL, patch_nums=(1, 2))
    per_image = transformer_flops(small), transformer_flops(MODEL)
    assert [TASK.image_flops(step) for step in (1, BOUNDARY, BOUNDARY + 1, 20)] == [
        per_image[0], per_image[0], per_image[1], per_image[1],
    ]  # fmt: skip
    for steps in (4, BOUNDARY, 17, 20, 30):
        totals = training_totals(MODEL, CONFIG, steps)
        early, late = 16 * min(steps, BOUNDARY), 16 * max(steps - BOUNDARY, 0)
        assert totals.pop("tokens") == 5 * early + 21 * late
        assert sum(totals.values()) == per_image[0] * early + per_image[1] * late
    whole = training_totals(MODEL, TRAIN_TRANSFORMER, 7)
    assert whole["head_flops"] == 3 * 7 * 16 * flops_by_part(MODEL)["head"]


def test_the_papers_schedule_saves():
    """Half of the steps with 55 to 424 of 680 tokens."""
    model = dataclasses.replace(MODEL, patch_nums=PATCH_NUMS_256)
    steps = lambda share: TrainTransformerConfig(steps=1000, progressive=share)
    tokens = [training_totals(model, steps(share), 1000)["tokens"] for share in (0.5, 0.0)]
    assert tokens[0] / tokens[1] == pytest.approx(
        0.5 + 0.1 * (55 + 91 + 155 + 255 + 424) / 680, abs=1e-3
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"progressive": 1.0}, r"progressive=1\.0; expected 0 to less than 1"),
        ({"progressive": 0.5}, r"progressive=0\.5 adds scales; a model of kind dit predicts none"),
    ],
)
def test_refusals(fields, sentence):
    config = {"transformer": {"kind": "dit"}, "train_transformer": {"steps": 5} | fields}
    with pytest.raises(BadInput, match=sentence):
        from_dict(Config, config)
