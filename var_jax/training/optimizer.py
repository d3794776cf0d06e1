"""AdamW with VAR's schedules (VAR §4; official `lr_control.py`)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from var_jax.config import TrainConfig, parse_lr_scale
from var_jax.tools.trees import path_name

# Positions, and what only shifts or scales, keep their size; biases and 1-D tensors do too.
NO_DECAY = ("start", "pos_embed", "level_embed", "log_scale", "ada_offset", "norm_offset")
WARMUP_START = 0.005  # of the peak
HOLD = 0.05  # the share of the steps that lin0 stays at its peak


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Step → learning rate: linear warm-up, then down to `final_lr_ratio`.

    lin0 holds the peak for 5 % of the steps, then falls linearly; cos falls along half a cosine.
    """
    final, last = config.final_lr_ratio, max(config.steps - 1, 1)

    def ratio(done: Float[Array, ""]) -> Float[Array, ""]:
        """done in [0, 1] → learning rate as a share of the peak."""
        if config.schedule == "cos":
            return final + (1 - final) * (0.5 + 0.5 * jnp.cos(jnp.pi * done))
        return jnp.where(done < HOLD, 1.0, final + (1 - final) * (1 - done) / (1 - HOLD))

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = WARMUP_START + (1 - WARMUP_START) * step / max(config.warmup_steps, 1)
        done = (step - config.warmup_steps) / max(last - config.warmup_steps, 1)
        peak = config.learning_rate * config.batch_size / 256
        return peak * jnp.where(step < config.warmup_steps, warm, ratio(done))

    return schedule


def weight_decay(config: TrainConfig) -> optax.Schedule:
    """Step → weight decay, along half a cosine."""
    start, final, last = config.weight_decay, config.final_weight_decay, max(config.steps - 1, 1)
    done = lambda step: jnp.asarray(step, jnp.float32) / last
    return lambda step: final + (start - final) * (0.5 + 0.5 * jnp.cos(jnp.pi * done(step)))


def decays(params: Any) -> Any:
    """Which leaves weight decay applies to, as a tree of bools like `params`."""

    def decay(path, leaf):
        name = path_name(path).split(".")
        dimensions = leaf.ndim - (name[0] == "blocks")  # blocks are stacked along one more
        return name[-1] not in NO_DECAY and not name[-1].endswith("bias") and dimensions > 1

    return jax.tree_util.tree_map_with_path(decay, params)


def scale_by_path(config: TrainConfig) -> optax.GradientTransformation:
    """Updates times the factor of the first pattern of `lr_scale` found in a weight's path."""
    scale = lambda path, update: update * rate_factor(config, path_name(path))

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def rate_factor(config: TrainConfig, name: str) -> float:
    """The factor on the learning rate of the weight at this path; 0 if it is frozen."""
    rules = parse_lr_scale(config.lr_scale)
    return next((factor for rule, factor in rules if rule.search(name)), 1.0)


def held(config: TrainConfig, params: Any, but: str = "") -> Any:
    """The weights, of which those that `lr_scale` freezes have no gradient, but for one at a path.

    So nothing is computed for them, and the gradient's norm is that of the others.
    """

    def hold(path, leaf):
        name = path_name(path)
        frozen = rate_factor(config, name) == 0 and name != but
        return jax.lax.stop_gradient(leaf) if frozen else leaf

    return jax.tree_util.tree_map_with_path(hold, params) if config.lr_scale else params


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay; some weights slower or frozen."""
    steps = [
        optax.clip_by_global_norm(config.clip_norm or jnp.inf),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(weight_decay(config), mask=decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]
    return optax.chain(*steps, *([scale_by_path(config)] if config.lr_scale else []))
