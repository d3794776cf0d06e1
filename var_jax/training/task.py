"""What the training loop needs to know of a training."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from var_jax.config import TrainConfig
from var_jax.training.state import Batch

Metrics = dict[str, Float[Array, "..."]]
Frozen = dict[str, Any]  # networks that are read but not trained


class Task(NamedTuple):
    """A training as pure functions, which the loop jits. The state is any pytree with a `step`."""

    name: str  # of its folder in the work directory and of its records
    config: TrainConfig
    init: Callable[[Key[Array, ""]], Any]  # key → state
    train_step: Callable[[Any, Batch, Frozen, Key[Array, ""]], tuple[Any, Metrics]]
    eval_step: Callable[[Any, Batch, Frozen], Metrics]  # values (B,), one an example
    layout: Callable[[tuple, Any], P]  # of the state on the mesh
    image_flops: float = 0.0  # the model's operations for one image of a step
    parts: int = 1  # in which a step takes its batch
