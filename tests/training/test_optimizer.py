"""Schedules and weight decay of the public implementation."""

import jax
import numpy as np
import pytest
from flax import nnx
from golden_cases import facts, load

from var_jax import BadInput
from var_jax.config import StageConfig, TransformerConfig
from var_jax.models.torch_names import leaves
from var_jax.models.transformer import Transformer
from var_jax.training.optimizer import decays, learning_rate, weight_decay

GOLD = load("schedules")


@pytest.mark.parametrize("name", ["cos", "lin", "lin0", "lin00", "lin0.3", "exp"])
@pytest.mark.parametrize(
    ("variant", "warmup", "final", "final_decay"), [("a", 10, 0.01, 0.0), ("b", 20, 0.1, 0.08)]
)
def test_golden_schedules(name, variant, warmup, final, final_decay):
    config = StageConfig(
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
        learning_rate(StageConfig(schedule="step"))


def test_learning_rate_scales_with_the_batch():
    config = StageConfig(steps=100, batch_size=768, schedule="cos")
    assert float(learning_rate(config)(0)) == pytest.approx(3e-4)


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
