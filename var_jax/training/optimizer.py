"""AdamW with VAR's schedules (VAR §4.1; official `lr_control.py`), and Muon for small models."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

from var_jax.config import SCHEDULES, StageConfig
from var_jax.sharding.ops import path_name, pin

# Positions, and what only shifts or scales, keep their size; biases and 1-D tensors do too.
NO_DECAY = ("start", "pos_embed", "level_embed", "log_scale", "ada_offset")

# Matrices of attention and MLP, with the axes they sum over and make; along others they are many.
MATRICES = {
    "qkv": optax.contrib.MuonDimensionNumbers(1, (3, 4)),
    "proj": optax.contrib.MuonDimensionNumbers((1, 2), 3),
    "fc1": optax.contrib.MuonDimensionNumbers(1, 2),
    "fc2": optax.contrib.MuonDimensionNumbers(1, 2),
}


def learning_rate(config: StageConfig) -> optax.Schedule:
    """Step → learning rate: linear warm-up, then the named decay to `final_lr_ratio`."""
    name, final, last = config.schedule, config.final_lr_ratio, max(config.steps - 1, 1)

    def ratio(done: Float[Array, ""]) -> Float[Array, ""]:
        """done, rest in [0, 1] → learning rate as a share of the peak."""
        rest = 1 - done
        if name == "cos":
            return final + (1 - final) * (0.5 + 0.5 * jnp.cos(jnp.pi * done))
        hold = SCHEDULES.get(name, 0.0)
        if name == "exp":
            return jnp.exp(jnp.maximum(done - hold, 0) / (1 - hold) * jnp.log(final))
        if name in SCHEDULES:
            falling = final + (1 - final) * rest / (1 - hold)
            return jnp.where(done < hold, 1.0, falling)
        knee = float(name[3:])  # slower until here, steeper after
        middle = (1 + final + (1 - final) * (1 - knee)) / 2
        falling = final + (middle - final) * rest / (1 - knee)
        return jnp.where(done < knee, 1 + (middle - 1) * done / knee, falling)

    def schedule(step):
        warm = config.start_lr_ratio + (1 - config.start_lr_ratio) * step / max(
            config.warmup_steps, 1
        )
        done = (step - config.warmup_steps) / max(last - config.warmup_steps, 1)
        peak = config.learning_rate * config.batch_size / 256
        return peak * jnp.where(step < config.warmup_steps, warm, ratio(done))

    return schedule


def weight_decay(config: StageConfig) -> optax.Schedule:
    """Step → weight decay, along half a cosine."""
    start, final, last = config.weight_decay, config.final_weight_decay, max(config.steps - 1, 1)
    return lambda step: final + (start - final) * (0.5 + 0.5 * jnp.cos(jnp.pi * step / last))


def decays(params: Any) -> Any:
    """Which leaves weight decay applies to, as a tree of bools like `params`."""

    def decay(path, leaf):
        name = path_name(path).split(".")
        dimensions = leaf.ndim - (name[0] == "blocks")  # blocks are stacked along one more
        return name[-1] not in NO_DECAY and not name[-1].endswith("bias") and dimensions > 1

    return jax.tree_util.tree_map_with_path(decay, params)


def make_optimizer(config: StageConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam (and Muon, if asked for), decoupled weight decay."""
    scale = optax.scale_by_adam(config.b1, config.b2)
    if config.optimizer == "muon":
        scale = optax.partition({"adam": scale, "muon": gathered(scale_by_muon())}, update_rules)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm or jnp.inf),
        scale,
        optax.add_decayed_weights(weight_decay(config), mask=decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def update_rules(params: Any) -> Any:
    """What updates each leaf, "muon" or "adam", as a tree like `params`."""

    def rule(path, leaf):
        *_, stack, last = ["", *path_name(path).split(".")]
        return "muon" if stack == "blocks" and last in MATRICES else "adam"

    return jax.tree_util.tree_map_with_path(rule, params)


def scale_by_muon() -> optax.GradientTransformation:
    """Momentum with all singular values alike (Muon), as large as Adam's updates usually are.

    So it takes Adam's learning rates: Moonlight, arXiv 2502.16982, §2.2. Its momentum is 0.95.
    """

    def axes(params):
        which = lambda path, _: MATRICES[path_name(path).split(".")[-1]]
        return jax.tree_util.tree_map_with_path(which, params)

    muon = optax.contrib.muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=axes)
    return optax.chain(muon, optax.scale(-1.0))  # its learning rate has turned the sign


def gathered(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on gathered arrays, for products over axes that are split; results lie as before.

    Every device holds them all and computes the same: for small models.
    """

    def update(updates, state, params=None):
        made = inner.update(*jax.tree.map(pin, (updates, state, params)))
        scatter = lambda x, before: pin(x, *jax.typeof(before).sharding.spec)
        return jax.tree.map(scatter, made, (updates, state))

    return optax.GradientTransformation(inner.init, update)
