"""What the trainings of all transformers share: the step around a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TrainTransformerConfig, TransformerConfig
from var_jax.models.transformer import KINDS, make_transformer
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import reshard
from var_jax.tools.flops import transformer_flops
from var_jax.training.optimizer import learning_rate, make_optimizer
from var_jax.training.state import (
    Batch,
    Frozen,
    Learner,
    TransformerState,
    accumulated,
    apply_gradients,
    start_learner,
    update_ema,
)
from var_jax.training.task import Metrics, Task, updates

# (transformer, batch, frozen networks, key) → loss of each image, and whatever else is known of it.
Loss = Callable[[Any, Batch, Frozen, Key[Array, ""]], tuple[Float[Array, " B"], Any]]


def transformer_task(
    model_config: TransformerConfig,
    config: TrainTransformerConfig,
    loss: Loss,
    evaluate: Callable[[Any, Batch, Frozen], Metrics],
    finish: Callable[[Learner, Any], tuple[Learner, Metrics]] = lambda *both: both,
) -> Task:
    """Trains a transformer on the mean of `loss`.

    `finish` may change the weights after a step by what the loss returned, in the mean, and says
    what of that is a metric. `evaluate` gives figures of the weights to use.
    """
    optimizer, schedule = make_optimizer(config), learning_rate(config)

    def init(key: Key[Array, ""]) -> TransformerState:
        transformer = make_transformer(model_config, rngs=nnx.Rngs(key))
        learner = start_learner(transformer, optimizer, config.ema_decay)
        return TransformerState(jnp.zeros((), jnp.int32), learner)

    def train_step(state: TransformerState, batch: Batch, frozen: Frozen, key: Key[Array, ""]):
        def loss_fn(transformer: Any, batch: Batch, key: Key[Array, ""]):
            each, made = loss(transformer, batch, frozen, key)
            return each.mean(), made

        (value, made), gradients = accumulated(
            loss_fn, state.transformer.params, batch, jax.random.fold_in(key, state.step),
            config.accumulate,
        )  # fmt: skip
        learner = apply_gradients(state.transformer, gradients, optimizer)
        learner, metrics = finish(update_ema(learner, state.step, config.ema_decay), made)
        norm, rate = optax.tree.norm(gradients), schedule(updates(state))
        metrics = {"loss": value, **metrics, "grad_norm": norm, "learning_rate": rate}
        return TransformerState(state.step + 1, learner), metrics

    def eval_step(state: TransformerState, batch: Batch, frozen: Frozen) -> Metrics:
        return evaluate(state.transformer.best, batch, frozen)

    layout, flops = KINDS[model_config.kind].layout, transformer_flops(model_config)
    return Task(
        "transformer", config, init, train_step, eval_step, layout, flops, config.accumulate
    )


def withhold_labels(
    key: Key[Array, ""], label: Int32[Array, " B"], rate: float, no_class: int
) -> Int32[Array, " B"]:
    """Labels, at this rate replaced by "no class", which guidance needs."""
    withheld = jax.random.bernoulli(key, rate, label.shape)
    return jnp.where(reshard(withheld, BATCH), no_class, label)
