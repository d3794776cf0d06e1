"""What the trainings of all transformers share: the step around a loss."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TrainTransformerConfig, TransformerConfig
from var_jax.models.transformer import KINDS, make_transformer
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import reshard
from var_jax.tools.flops import at_stage, transformer_flops
from var_jax.training.optimizer import held, learning_rate, make_optimizer
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

# (transformer, batch, frozen networks, step, key) → loss of each image, and whatever else is known.
Loss = Callable[
    [Any, Batch, Frozen, Int32[Array, ""], Key[Array, ""]], tuple[Float[Array, " B"], Any]
]


def transformer_task(
    model_config: TransformerConfig,
    config: TrainTransformerConfig,
    losses: Sequence[Loss],
    evaluate: Callable[[Any, Batch, Frozen], Metrics],
    finish: Callable[[Learner, Any], tuple[Learner, Metrics]] = lambda *both: both,
) -> Task:
    """Trains a transformer on the mean of a loss: that of the stage, of which `losses` has each.

    Stages differ in shapes: each is a branch of the program, with its own gradient. `finish` may
    change the weights after a step by what the loss returned, in the mean, and says what of that is
    a metric. `evaluate` gives figures of the weights to use.
    """
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    stages = config.stages(model_config)
    starts = np.array([stage.start for stage in stages])

    def init(key: Key[Array, ""]) -> TransformerState:
        transformer = make_transformer(model_config, rngs=nnx.Rngs(key))
        learner = start_learner(transformer, optimizer, config.ema_decay)
        return TransformerState(jnp.zeros((), jnp.int32), learner)

    def train_step(state: TransformerState, batch: Batch, frozen: Frozen, key: Key[Array, ""]):
        def gradient(loss: Loss):
            def mean(transformer: Any, batch: Batch, key: Key[Array, ""]):
                each, aux = loss(held(config, transformer), batch, frozen, state.step, key)
                return each.mean(), aux

            of_step = jax.random.fold_in(key, state.step)
            return accumulated(mean, state.transformer.params, batch, of_step, config.accumulate)

        stage = (state.step >= starts).sum() - 1
        branches = [functools.partial(gradient, loss) for loss in losses]
        (value, aux), gradients = jax.lax.switch(stage, branches)
        learner = apply_gradients(state.transformer, gradients, optimizer)
        learner, metrics = finish(update_ema(learner, state.step, config.ema_decay), aux)
        norm, rate = optax.tree.norm(gradients), schedule(updates(state))
        metrics = {"loss": value, **metrics, "grad_norm": norm, "learning_rate": rate}
        return TransformerState(state.step + 1, learner), metrics

    def eval_step(state: TransformerState, batch: Batch, frozen: Frozen) -> Metrics:
        return evaluate(state.transformer.best, batch, frozen)

    def image_flops(step: int) -> int:
        model = at_stage(model_config, stages[(step > starts).sum() - 1])
        return config.passes * transformer_flops(model)

    layout = KINDS[model_config.kind].layout
    return Task(
        "transformer", config, init, train_step, eval_step, layout, image_flops, config.accumulate
    )


def withhold_labels(
    key: Key[Array, ""], label: Int32[Array, " B"], rate: float, no_class: int
) -> Int32[Array, " B"]:
    """Labels, at this rate replaced by "no class", which guidance needs."""
    withheld = jax.random.bernoulli(key, rate, label.shape)
    return jnp.where(reshard(withheld, BATCH), no_class, label)
