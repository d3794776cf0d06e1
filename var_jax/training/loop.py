"""The loop that both stages run in: resume, step, log, save, look."""

import contextlib
import signal
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import grain
import jax
import numpy as np

from var_jax import BadInput
from var_jax.data.pipeline import epoch
from var_jax.data.sources import Source
from var_jax.infra.checkpoint import Checkpoints
from var_jax.infra.logs import Metrics, progress
from var_jax.infra.mesh import put_batch, shard
from var_jax.training.state import Stage, TrainState, layout

Look = Callable[[int, TrainState], dict[str, float]]


def run(
    stage: Stage,
    batches: grain.DatasetIterator,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    directory: str | PurePath,
    metrics: Metrics,
    constants: dict[str, Any] | None = None,
    look: Look | None = None,
) -> TrainState:
    """Trains `stage` to its last step and returns the state; call it under `jax.set_mesh(mesh)`.

    Starts from the newest checkpoint under `directory`, with the data where it was, so that a run
    stopped anywhere ends with the numbers of one never stopped. `constants` join every batch (the
    frozen tokenizer). `look` makes pictures and validation figures every `sample_every` steps and
    at the end. Ctrl-C saves, then raises KeyboardInterrupt.

    Raises: BadInput if the checkpoints are another config's, or the loss is no longer finite.
    """
    config, key = stage.config, jax.random.key(seed)
    checkpoints = Checkpoints(directory)
    state, start = restore_or_init(stage, checkpoints, batches, mesh, seed)
    metrics.rewind(stage.name, start)
    train_step = jax.jit(stage.train_step, donate_argnums=0)
    pending = None  # metrics of the step before, read while this one runs

    def flush():
        if pending is not None:
            write(metrics, stage.name, *pending)

    with progress(config.steps, start, stage.name) as bar, deferred_interrupt() as interrupted:
        for step in range(start + 1, config.steps + 1):
            batch = put_batch(next(batches), mesh) | (constants or {})
            state, values = train_step(state, batch, key)
            bar.update(1, **({"loss": pending[1]["loss"]} if pending else {}))
            last, stop = step == config.steps, bool(interrupted)
            if step % config.log_every == 0 or last:
                flush()
                pending = (step, values)
            saves = step % config.save_every == 0 or last or stop
            looks = last or (config.sample_every and step % config.sample_every == 0)
            if saves or looks:
                flush()
                pending = None
                check(stage.name, step, values)
            if look and looks:
                metrics.write(stage.name, step, **look(step, state))
            if saves:
                checkpoints.save(step, state, batches.get_state(), wait=last or stop)
            if stop:
                break
    checkpoints.close()
    if interrupted:
        raise KeyboardInterrupt
    return state


def restore_or_init(
    stage: Stage,
    checkpoints: Checkpoints,
    batches: grain.DatasetIterator,
    mesh: jax.sharding.Mesh,
    seed: int,
) -> tuple[TrainState, int]:
    """The newest checkpoint, with `batches` set to where it was; or step 0, born sharded."""
    key = jax.random.key(seed)
    abstract = shard(jax.eval_shape(stage.init, key), mesh, layout)
    restored = checkpoints.restore(abstract)
    if restored:
        step, state, position = restored
        assert isinstance(position, dict)
        batches.set_state(position)
        return state, step
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(stage.init, out_shardings=shardings)(key), 0


def write(metrics: Metrics, name: str, step: int, values: dict) -> None:
    """Logs one step. Raises: BadInput if it diverged."""
    check(name, step, values)
    metrics.write(name, step, **jax.device_get(values))


def check(name: str, step: int, values: dict) -> None:
    """Raises BadInput if a step diverged, so that its weights are never saved."""
    for what in ("loss", "grad_norm"):
        if not np.isfinite(value := float(values[what])):
            raise BadInput(
                f"the {what} of {name} is {value} at step {step}; the checkpoint before it is kept:"
                " start anew in another --workdir with a lower learning rate."
            )


def evaluate(
    stage: Stage,
    state: TrainState,
    source: Source,
    batch_size: int,
    *,
    mesh: jax.sharding.Mesh,
    constants: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Means over all of `source`, as `val_NAME`."""
    step, total, count = jax.jit(stage.eval_step), {}, 0
    share = batch_size // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for batch in epoch(source, batch_size):
        mask = batch.pop("mask")
        batch = put_batch({k: v[mine] for k, v in batch.items()}, mesh) | (constants or {})
        for name, values in step(state, batch).items():
            # Replicated, so that every process reads all of it.
            values = jax.device_get(jax.sharding.reshard(values, jax.sharding.PartitionSpec()))
            total[name] = total.get(name, 0.0) + float(values[mask].sum())
        count += int(mask.sum())
    return {f"val_{name}": value / count for name, value in total.items()}


@contextlib.contextmanager
def deferred_interrupt():
    """Collects Ctrl-C and SIGTERM, so that the step in flight ends; a second Ctrl-C is at once."""
    received: list[int] = []

    def handle(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
