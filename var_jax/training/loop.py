"""The loop that both stages run in: resume, step, log, save, look."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Key

from var_jax import BadInput
from var_jax.checkpoints.training import Checkpoints
from var_jax.config import StageConfig
from var_jax.data.pipeline import epoch
from var_jax.data.sources import Source
from var_jax.sharding.mesh import put_batch, put_whole, shard, to_host
from var_jax.tools.flops import peak_flops
from var_jax.tools.logs import Metrics, progress
from var_jax.training.state import Stage, TrainState, layout

Look = Callable[[int, TrainState], dict[str, Any]]


def run(
    stage: Stage,
    batches: grain.DatasetIterator,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    directory: str | PurePath,
    metrics: Metrics,
    look: Look,
    constants: dict[str, Any] | None = None,
    profile: int = 0,
) -> TrainState:
    """Trains `stage` to its last step and returns the state; call it under `jax.set_mesh(mesh)`.

    Starts from the newest checkpoint under `directory`, with the data where it was, so that a run
    stopped anywhere ends with the numbers of one never stopped. `constants` join every batch (the
    frozen tokenizer). `look` makes pictures and validation figures every `sample_every` steps and
    at the end, once that step is saved. Ctrl-C, SIGTERM and a preemption notice on any host save,
    then raise KeyboardInterrupt. `profile` many steps are traced, from the tenth of this start on.

    Raises: BadInput if the checkpoints are another config's, or the loss is no longer finite.
    """
    config = stage.config
    # Apart, because both number what they draw by folding small integers into their key.
    init_key, key = jax.random.split(jax.random.key(seed))
    checkpoints = Checkpoints(directory, keep_every=config.keep_every)
    state, start = restore_or_init(stage, checkpoints, batches, mesh, init_key)
    metrics.rewind(stage.name, start)
    if 0 < start < config.steps:
        say(f"{stage.name}: going on from step {start}")
    train_step = jax.jit(stage.train_step, donate_argnums=0)
    step, pending = start, None  # metrics of the step before, read while this one runs

    def flush():
        if pending is not None:
            write(metrics, stage.name, *pending)

    speed = Speed(stage)
    with (
        contextlib.closing(checkpoints),  # whatever happens, a save under way ends
        contextlib.closing(metrics),
        progress(config.steps, start, stage.name) as bar,
        deferred_interrupt() as interrupted,
        Trace(directory, start + 10, profile) as trace,
    ):
        stopped = agree(start, interrupted)  # also tells the other hosts where this one is
        if due(start, config) and not looked(metrics, stage.name, start):
            metrics.write(stage.name, start, **look(start, state))
        for step in () if stopped else range(start + 1, config.steps + 1):
            trace(step)
            with speed.waiting():
                batch = put_batch(next(batches), mesh) | (constants or {})
            state, values = train_step(state, batch, key)
            bar.update(1, **({"loss": pending[1]["loss"]} if pending else {}))
            last, stop = step == config.steps, agree(step, interrupted)
            if step % config.log_every == 0 or last:
                flush()
                pace = speed.since(step - start)
                metrics.write(stage.name, step, file="speed.jsonl", **pace)
                pending = (step, values)
            if step % config.save_every == 0 or due(step, config) or stop:
                flush()
                pending = None
                check(stage.name, step, values)
                checkpoints.save(step, state, batches.get_state(), wait=last or stop)
            if due(step, config):
                metrics.write(stage.name, step, **look(step, state))
            if stopped := stop:
                break
        stopped = stopped or agree(config.steps + 1, interrupted)  # during the last look
    if stopped:
        say(f"{stage.name}: saved; the same command goes on from step {step}")
        raise KeyboardInterrupt
    return state


def say(sentence: str) -> None:
    """Prints on stderr, once for all processes."""
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr, flush=True)


def restore_or_init(
    stage: Stage,
    checkpoints: Checkpoints,
    batches: grain.DatasetIterator,
    mesh: jax.sharding.Mesh,
    key: Key[Array, ""],
) -> tuple[TrainState, int]:
    """The newest checkpoint, with `batches` set to where it was; or step 0, born sharded."""
    abstract = shard(jax.eval_shape(stage.init, key), mesh, layout)
    restored = checkpoints.restore(abstract)
    if restored:
        step, state, position = restored
        batches.set_state(position)
        return state, step
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(stage.init, out_shardings=shardings)(key), 0


def due(step: int, config: StageConfig) -> bool:
    """Whether pictures and validation figures are, after this step."""
    regular = config.sample_every and step % config.sample_every == 0
    return step > 0 and bool(regular or step == config.steps)


def looked(metrics: Metrics, name: str, step: int) -> bool:
    """Whether the look after a saved step was logged, or the run stopped in between."""
    records = metrics.records() if jax.process_index() == 0 else []
    at = [r for r in records if (r["stage"], r["step"]) == (name, step)]
    return bool(multihost_utils.broadcast_one_to_all(any("loss" not in r for r in at)))


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
    for batch in epoch(source, batch_size):
        mask = batch.pop("mask")
        values = to_host(step(state, put_whole(batch, mesh) | (constants or {})))
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + float(value[mask].sum())
        count += int(mask.sum())
    return {f"val_{name}": value / count for name, value in total.items()}


class Speed:
    """Images a second, share of the peak the chips make (MFU), share of time waited for data."""

    def __init__(self, stage: Stage):
        self._stage, self._peak = stage, peak_flops(jax.devices()[0].device_kind)
        self._steps, self._since, self._waited = 0, time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    def since(self, steps: int) -> dict[str, Any]:
        """The figures since the last call, after so many steps in all."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = (steps - self._steps) * self._stage.config.batch_size / seconds
        found = {"images_per_second": rate, "data_wait": self._waited / seconds}
        if self._peak and self._stage.image_flops:
            found["mfu"] = rate * self._stage.image_flops / self._peak / jax.device_count()
        self._steps, self._since, self._waited = steps, time.monotonic(), 0.0
        return found


class Trace:
    """A profiler trace of steps `first` ... `first + count - 1`, for TensorBoard or xprof."""

    def __init__(self, directory: str | PurePath, first: int, count: int):
        self._folder = str(epath.Path(directory).parent / "tensorboard")
        self._first, self._end, self._on = first, first + count, False

    def __enter__(self):
        return self

    def __call__(self, step: int) -> None:
        """Starts or stops ahead of `step`."""
        if step == self._first and self._end > self._first:
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif step == self._end:
            self.__exit__()

    def __exit__(self, *error: Any) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def agree(step: int, interrupted: list[int]) -> bool:
    """Whether to stop after this step; the same answer on every host, whichever was told to."""
    if jax.process_count() == 1:
        return bool(interrupted)
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def deferred_interrupt():
    """Collects Ctrl-C and SIGTERM, so that the step in flight ends; a second Ctrl-C is at once.

    Of several hosts jax's own service hears SIGTERM and tells the others; Ctrl-C becomes one.
    """
    received: list[int] = []

    def handle(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if jax.process_index() == 0:  # unbuffered: a signal may come amid a print
            os.write(2, b"stopping: this step ends, then it saves\n")
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    heard = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, handle) for number in heard}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
