"""What training carries from step to step: a learner for each network that is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from var_jax.sharding.ops import split_rows

Batch = dict[str, Array]
Frozen = dict[str, Any]  # networks that are read but not trained


class Learner(NamedTuple):
    """A network's weights, their moving average (None if none is kept), the optimizer's state."""

    params: Any
    ema: Any
    opt_state: optax.OptState

    @property
    def best(self) -> Any:
        """The weights to use: the average where one is kept."""
        return self.params if self.ema is None else self.ema


class TransformerState(NamedTuple):
    """The transformer, of any kind."""

    step: Int32[Array, ""]
    transformer: Learner


def start_learner(
    params: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> Learner:
    """A learner at step 0."""
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return Learner(params, ema, optimizer.init(params))


def apply_gradients(
    learner: Learner, gradients: Any, optimizer: optax.GradientTransformation
) -> Learner:
    """One optimizer step; the moving average follows by `update_ema`."""
    updates, opt_state = optimizer.update(gradients, learner.opt_state, learner.params)
    params = optax.apply_updates(learner.params, updates)
    return learner._replace(params=params, opt_state=opt_state)


def update_ema(learner: Learner, step: Int32[Array, ""], decay: float) -> Learner:
    """The moving average after so many steps; warms up, to forget the start."""
    if learner.ema is None:
        return learner
    done = step.astype(jnp.float32)
    now = jnp.minimum(decay, (1 + done) / (10 + done))
    # In this form what no step changes stays exactly as it is: tokens of a frozen encoder do, too.
    nearer = lambda new, old: old + (1 - now) * (new - old)
    return learner._replace(ema=jax.tree.map(nearer, learner.params, learner.ema))


def start_from(learner: Learner, params: Any) -> Learner:
    """A learner at step 0 with other weights."""
    ema = None if learner.ema is None else jax.tree.map(jnp.copy, params)
    return learner._replace(params=params, ema=ema)


def accumulated(
    loss_fn: Callable[..., Any], params: Any, batch: Batch, key: Array, parts: int
) -> tuple[Any, Any]:
    """`value_and_grad` of `loss_fn(params, batch, key)`, means over equal parts of the batch.

    Part i takes every `parts`-th row from i on, so that no row leaves its device.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return gradient(params, batch, key)
    pieces = jax.tree.map(lambda x: split_rows(x, parts), batch)

    def step(total, i):
        piece = jax.tree.map(lambda x: x[:, i], pieces)
        return jax.tree.map(
            jnp.add, total, gradient(params, piece, jax.random.fold_in(key, i))
        ), None

    first = jax.tree.map(lambda x: x[:, 0], pieces)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, first, key))
    total, _ = jax.lax.scan(step, zeros, jnp.arange(parts))
    return jax.tree.map(lambda x: x / parts, total)
