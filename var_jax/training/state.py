"""What training carries from step to step, and how it lies on the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from var_jax.config import StageConfig
from var_jax.models.var import LAYOUT
from var_jax.sharding.ops import path_name, split_rows
from var_jax.training.codebook import CodebookStats


class TrainState(NamedTuple):
    """Weights, their moving average (None if not kept), optimizer moments, codebook statistics."""

    step: Int32[Array, ""]
    model: Any
    ema: Any
    moments: optax.OptState
    codebook: CodebookStats | None = None

    @property
    def best(self) -> Any:
        """The weights to use: the average where one is kept."""
        return self.model if self.ema is None else self.ema


Metrics = dict[str, Float[Array, ""]]
Batch = dict[str, Any]  # arrays, and the frozen tokenizer


class Stage(NamedTuple):
    """One of the two trainings, as pure functions that the loop jits."""

    name: str
    config: StageConfig
    init: Callable[[Array], TrainState]  # key → state
    train_step: Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], Metrics]  # values (B,), one an example
    image_flops: float = 0.0  # the model's operations for one image of a step


def init_state(
    model: Any, optimizer: optax.GradientTransformation, config: StageConfig
) -> TrainState:
    """The state at step 0."""
    ema = jax.tree.map(jnp.copy, model) if config.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), model, ema, optimizer.init(model))


def apply_gradients(
    state: TrainState,
    gradients: Any,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """One optimizer step; the moving average follows by `average`."""
    updates, moments = optimizer.update(gradients, state.moments, state.model)
    model = optax.apply_updates(state.model, updates)
    return state._replace(step=state.step + 1, model=model, moments=moments)


def accumulated(
    loss_fn: Callable[..., Any], model: Any, arrays: Batch, key: Array, parts: int
) -> tuple[Any, Any]:
    """`value_and_grad` of `loss_fn(model, arrays, key)`, means over equal parts of the batch.

    Part i takes every `parts`-th row from i on, so that no row leaves its device.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return gradient(model, arrays, key)
    pieces = jax.tree.map(lambda x: split_rows(x, parts), arrays)

    def step(total, i):
        piece = jax.tree.map(lambda x: x[:, i], pieces)
        return jax.tree.map(
            jnp.add, total, gradient(model, piece, jax.random.fold_in(key, i))
        ), None

    first = jax.tree.map(lambda x: x[:, 0], pieces)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, model, first, key))
    total, _ = jax.lax.scan(step, zeros, jnp.arange(parts))
    return jax.tree.map(lambda x: x / parts, total)


def average(state: TrainState, config: StageConfig) -> TrainState:
    """The moving average, once a step's weights are final; warms up, to forget the start."""
    if state.ema is None:
        return state
    done = state.step - 1
    decay = jnp.minimum(config.ema_decay, (1 + done) / (10 + done))
    return state._replace(ema=optax.incremental_update(state.model, state.ema, 1 - decay))


def layout(path: tuple, leaf: Any) -> P:
    """The PartitionSpec of a leaf of the state; moments and averages lie as their weights do."""
    names = path_name(path).split(".")
    spec = LAYOUT.get(names[-1], ()) if leaf.ndim > 1 else ()
    return P(None, *spec) if spec and "blocks" in names else P(*spec)
