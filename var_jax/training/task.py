"""What the training loop needs to know of a training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TrainConfig
from var_jax.tools.trees import path_name
from var_jax.training.state import Batch, Frozen

Metrics = dict[str, Float[Array, "..."]]


class Task(NamedTuple):
    """A training as pure functions, which the loop jits. The state is any pytree with a `step`."""

    name: str  # of its folder in the work directory and of its records
    config: TrainConfig
    init: Callable[[Key[Array, ""]], Any]  # key → state
    train_step: Callable[[Any, Batch, Frozen, Key[Array, ""]], tuple[Any, Metrics]]
    eval_step: Callable[[Any, Batch, Frozen], Metrics]  # values (B,), one an example
    layout: Callable[[tuple, Any], P]  # of the state on the mesh
    # Step, the first being 1 → the model's operations for one of its images.
    image_flops: Callable[[int], float] = lambda step: 0.0
    parts: int = 1  # in which a step takes its batch

    def step(
        self,
        state: Any,
        skipped: Int32[Array, ""],
        batch: Batch,
        frozen: Frozen,
        key: Key[Array, ""],
    ) -> tuple[Any, Int32[Array, ""], Metrics]:
        """A training step that keeps the state, all but its `step`, if loss or gradients overflow.

        `skipped` counts such steps in a row. The metric of that name counts all of the training.
        """
        new, metrics = self.train_step(state, batch, frozen, key)
        norms = [metrics[name] for name in metrics if name.endswith("grad_norm")]
        finite = jnp.isfinite(jnp.stack([metrics["loss"], *norms])).all()
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        kept = kept._replace(step=new.step)
        metrics |= {"skipped": kept.step - updates(kept)}
        return kept, jnp.where(finite, 0, skipped + 1), metrics


def updates(state: Any) -> Int32[Array, ""]:
    """How many updates an optimizer in the state has made: it counts none of a skipped step."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    counts = [leaf for path, leaf in leaves if path_name(path).split(".")[-1] == "count"]
    return counts[0] if counts else state.step
