"""Schedules and weight decay of the public implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_cases import facts, load

from var_jax import BadInput
from var_jax.checkpoints.torch.names import leaves
from var_jax.config import TrainConfig, TransformerConfig
from var_jax.models.var import Transformer
from var_jax.training.optimizer import decays, held, learning_rate, make_optimizer, weight_decay

GOLD = load("schedules")


@pytest.mark.parametrize("name", ["cos", "lin0"])
@pytest.mark.parametrize(
    ("variant", "warmup", "final", "final_decay"), [("a", 10, 0.01, 0.0), ("b", 20, 0.1, 0.08)]
)
def test_golden_schedules(name, variant, warmup, final, final_decay):
    config = TrainConfig(
        steps=200, learning_rate=3e-4, batch_size=256, schedule=name, warmup_steps=warmup,
        final_lr_ratio=final, final_weight_decay=final_decay,
    )  # fmt: skip
    steps = np.arange(200)
    rate = jax.vmap(learning_rate(config))(steps)
    np.testing.assert_allclose(rate, GOLD[f"lr_{name}_{variant}"], rtol=1e-4, atol=1e-10)
    decay = jax.vmap(weight_decay(config))(steps)
    np.testing.assert_allclose(decay, GOLD[f"wd_{name}_{variant}"], rtol=1e-4, atol=1e-8)


def test_unknown_schedule():
    with pytest.raises(BadInput, match="schedule='step' is not one of"):
        learning_rate(TrainConfig(schedule="step"))


def test_learning_rate_scales_with_the_batch():
    config = TrainConfig(steps=100, batch_size=768, schedule="cos")
    assert float(learning_rate(config)(0)) == pytest.approx(3e-4)


@pytest.mark.parametrize(("most", "left"), [(0.0, 1.0), (5.0, 0.5)])
def test_gradients_are_clipped_unless_the_norm_is_0(most, left):
    clip = make_optimizer(TrainConfig(clip_norm=most, b1=0.0, weight_decay=0.0))
    weights = {"w": np.zeros(2, "f4")}
    _, moments = clip.update({"w": np.array([6, 8], "f4")}, clip.init(weights), weights)
    np.testing.assert_allclose(optax.tree.get(moments, "mu")["w"], [6 * left, 8 * left], rtol=1e-6)


def test_what_decays():
    config = TransformerConfig.from_depth(16)
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    flags = jax.tree.leaves(decays(model))
    spared = {
        name
        for (_, _, names, _), decay in zip(leaves(model), flags, strict=True)
        for name in names
        if not decay
    }
    assert spared == set(facts()["no_weight_decay_d16"])


def test_shared_adaln_offsets_do_not_decay():
    config = TransformerConfig(depth=2, width=64, num_heads=2, shared_adaln=True)
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert not decays(model).blocks.ada_offset.get_raw_value()


def test_frozen_weights_have_no_gradient_but_one():
    config = TrainConfig(lr_scale="a=0,b=0.5")
    weights = {name: jnp.ones(()) for name in ("a.x", "a.y", "b")}
    gradient = jax.grad(lambda weights: sum(held(config, weights, "a.y").values()))(weights)
    assert gradient == {"a.x": 0, "a.y": 1, "b": 1}


@pytest.mark.slow
def test_groups_of_weights_are_frozen_or_slower():
    config = TrainConfig(lr_scale="word=0,blocks.*fc1=0.5", weight_decay=0.0, batch_size=256)
    sizes = TransformerConfig(depth=2, width=16, num_heads=2, vocab_size=32, num_classes=3)
    model = Transformer(sizes, rngs=nnx.Rngs(0))
    gradients = jax.tree.map(jax.numpy.ones_like, model)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradients, optimizer.init(model), model)
    rate = float(updates.head[...][0, 0])
    assert rate < 0 and not np.any(updates.word[...]) and not np.any(updates.word_bias[...])
    np.testing.assert_allclose(updates.blocks.fc1[...], 0.5 * rate, rtol=1e-5)
    np.testing.assert_allclose(updates.blocks.fc2[...], rate, rtol=1e-5)


@pytest.mark.parametrize("text", ["head", "head=fast", "(=1", "head=-1", "=1"])
def test_bad_lr_scale(text):
    with pytest.raises(BadInput, match=r"lr_scale=.*; expected REGEX=FACTOR"):
        TrainConfig(lr_scale=text)
