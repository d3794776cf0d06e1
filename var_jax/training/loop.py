"""The loop that every training runs in: resume, step, log, save, hooks."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Int32, Key

from var_jax import BadInput
from var_jax.checkpoints.training import Checkpoints
from var_jax.config import EveryConfig
from var_jax.data.pipeline import epoch
from var_jax.data.sources import Source
from var_jax.sharding.mesh import put_batch, shard
from var_jax.tools import ending
from var_jax.tools.flops import peak_flops
from var_jax.tools.logs import Metrics, progress
from var_jax.training.task import Frozen, Task

MAX_SKIPPED = 20  # steps in a row that were not finite: more do not help


class Hook(NamedTuple):
    """What runs after every `every`-th step and the last one, and the figures that it returns."""

    name: str
    every: int  # 0: only after the last step
    run: Callable[[int, Any], dict[str, Any]]  # (step, state)

    def is_due(self, step: int, last: int) -> bool:
        """Whether it runs after this step."""
        return step == last or bool(self.every and step > 0 and step % self.every == 0)


@ending.listening()  # for those who call this by themselves
def run(
    task: Task,
    batches: grain.DatasetIterator,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    directory: str | PurePath,
    metrics: Metrics,
    every: EveryConfig,
    frozen: Frozen | None = None,
    hooks: Sequence[Hook] = (),
    initialize: Callable[[Any], Any] | None = None,
    profile: int = 0,
) -> Any:
    """Trains `task` to its last step and returns the state; call it under `jax.set_mesh(mesh)`.

    Starts from the newest checkpoint under `directory`, with the data where it was, so that a run
    stopped anywhere ends with the numbers of one never stopped; or from step 0, where `initialize`
    may replace weights (fine-tuning). Ctrl-C, SIGTERM, SIGHUP on any host save what is not saved,
    then raise KeyboardInterrupt. A step whose loss or gradient is not finite changes nothing.
    `profile` many steps are traced, from the tenth of this start on.

    Raises: BadInput if the checkpoints are another config's, or steps stay not finite.
    """
    config, frozen = task.config, frozen or {}
    # Apart, because both number what they draw by folding small integers into their key.
    init_key, key = jax.random.split(jax.random.key(seed))
    checkpoints = Checkpoints(directory, keep_every=every.keep, before_commit=metrics.flush)
    state, step = restore_or_init(task, checkpoints, batches, mesh, init_key, initialize)
    metrics.rewind(task.name, step)
    if 0 < step < config.steps:
        say(f"{task.name}: going on from step {step}")
    train_step = jax.jit(task.step, donate_argnums=0)
    after = AfterStep(task, checkpoints, batches, metrics, every, hooks)
    compiled, skipped = False, jnp.zeros((), jnp.int32)
    with (
        contextlib.closing(checkpoints),  # whatever happens, a save under way ends
        contextlib.closing(metrics),
        progress(config.steps, step, task.name) as bar,
        Trace(directory, step + 10, profile) as trace,
        ending.unsaved(),
    ):
        stop = after.restart(step, state)
        while step < config.steps and not stop:
            step += 1
            trace(step, state)
            with ending.unsaved(compiled):
                with after.speed.waiting():
                    batch = put_batch(next(batches), mesh)
                state, skipped, values = train_step(state, skipped, batch, frozen, key)
                after.speed.count(values)
            compiled = True
            bar.update(1, **after.log.shown)
            stop = after(step, state, skipped, values)
    if stop or ending.stop_requested():
        say(f"{task.name}: saved; the same command goes on from step {step}")
        raise KeyboardInterrupt
    return state


def say(sentence: str) -> None:
    """Prints on stderr, once for all processes."""
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr, flush=True)


def restore_or_init(
    task: Task,
    checkpoints: Checkpoints,
    batches: grain.DatasetIterator,
    mesh: jax.sharding.Mesh,
    key: Key[Array, ""],
    initialize: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The newest checkpoint, with `batches` set to where it was; or step 0, born sharded."""
    abstract = shard(jax.eval_shape(task.init, key), mesh, task.layout)
    restored = checkpoints.restore(abstract)
    if restored:
        step, state, position = restored
        batches.set_state(position)
        return state, step
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(task.init, out_shardings=shardings)(key)
    return initialize(state) if initialize else state, 0


class AfterStep:
    """What follows a step where it is due: records, a checkpoint, and hooks once it is saved."""

    def __init__(
        self,
        task: Task,
        checkpoints: Checkpoints,
        batches: grain.DatasetIterator,
        metrics: Metrics,
        every: EveryConfig,
        hooks: Sequence[Hook],
    ):
        self._name, self._last = task.name, task.config.steps
        self._owed: list[Hook] = []  # that were due at a step that was skipped
        self._checkpoints, self._batches, self._metrics = checkpoints, batches, metrics
        self._every, self._hooks = every, hooks
        self.log, self.speed = DelayedLog(task.name, metrics), Speed(task)

    def restart(self, step: int, state: Any) -> bool:
        """Runs hooks that were due at a saved step when the run was stopped; whether to stop."""
        records = self._metrics.records() if jax.process_index() == 0 else []
        records = [r for r in records if (r["stage"], r["step"]) == (self._name, step)]
        done = {record.get("hook") for record in records}
        missed = [
            step > 0 and h.is_due(step, self._last) and h.name not in done for h in self._hooks
        ]
        missed = multihost_utils.broadcast_one_to_all(np.array(missed, bool))
        due = [hook for hook, runs in zip(self._hooks, missed, strict=True) if runs]
        return self._run_hooks(due, step, state) or ending.stop_requested()

    def __call__(
        self, step: int, state: Any, skipped: Int32[Array, ""], values: dict[str, Any]
    ) -> bool:
        """Does what is due after a step; `skipped` in a row were not finite. Whether to stop."""
        last, stop = step == self._last, ending.stop_requested()
        due = [h for h in self._hooks if h in self._owed or h.is_due(step, self._last)]
        if step % self._every.log == 0 or last:
            self.log.write(step, values, skipped)
            if pace := self.speed.up_to(step):
                self._metrics.write(self._name, step, file="speed.jsonl", **pace)
        if step % self._every.save == 0 or last or stop or due:
            self.log.flush()
            if stop or last or not int(skipped):
                wait = bool(last or stop or due)  # a stop during hooks loses nothing
                self._checkpoints.save(step, state, self._batches.get_state(), wait=wait)
            else:
                self._owed, due = due, []  # until a step is kept: no hook runs unsaved
            stop = stop or ending.stop_requested()
        if due and not stop:  # else the next start runs them
            self._owed = []
            with self.speed.excluding():
                stop = self._run_hooks(due, step, state)
        return stop

    def _run_hooks(self, hooks: Sequence[Hook], step: int, state: Any) -> bool:
        """Runs hooks and records their figures; whether a signal ended them."""
        self.log.flush()
        for hook in hooks:
            try:
                with ending.unsaved(False):
                    figures = hook.run(step, state)
            except KeyboardInterrupt:
                return True
            self._metrics.write(self._name, step, hook=hook.name, **finite(figures))
            for name in figures.keys() - finite(figures):
                say(f"{self._name}: {name} is {figures[name]} at step {step}")
        return False


class DelayedLog:
    """Metrics of a step, read from the devices only while a later one runs."""

    def __init__(self, name: str, metrics: Metrics):
        self._name, self._metrics = name, metrics
        self._waiting: tuple[int, dict, Array] | None = None
        self._skipped = 0

    @property
    def shown(self) -> dict[str, Any]:
        """What the progress bar shows."""
        return {"loss": self._waiting[1]["loss"]} if self._waiting else {}

    def write(self, step: int, values: dict, in_a_row: Int32[Array, ""]) -> None:
        """Takes the metrics of a step, and writes those it has."""
        self.flush()
        self._waiting = step, values, in_a_row

    def flush(self) -> None:
        """Writes what waits. Raises: BadInput if the training does not recover."""
        if not self._waiting:
            return
        (step, values, in_a_row), self._waiting = self._waiting, None
        values = jax.device_get(values)
        if values["skipped"] > self._skipped:
            say(f"{self._name}: skipped, as not finite: {values['skipped']} steps up to {step}")
        self._skipped = values["skipped"]
        self._metrics.write(self._name, step, **finite(values))
        if in_a_row >= MAX_SKIPPED:
            raise BadInput(  # no Failure: started again it would take the same steps
                f"the last {in_a_row} steps of {self._name} up to step {step} were not finite (loss"
                f" {values['loss']:g}); the checkpoint before them is kept: start anew in another"
                " --workdir with a lower learning rate."
            )


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are numbers."""
    return {name: value for name, value in values.items() if np.all(np.isfinite(value))}


def make_evaluation(
    task: Task, source: Source, *, mesh: jax.sharding.Mesh, frozen: Frozen | None = None
) -> Callable[[Any], dict[str, float]]:
    """A function of the state: means over all of `source`, as `val_NAME`.

    Each process reads its share, in batches no larger than the parts of a training step. Sums stay
    on the devices until the end. One program serves every call.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, state, batch, mask, frozen):
        values = task.eval_step(state, batch, frozen)
        masked_sum = lambda value: jnp.where(mask, value, 0.0).sum()
        return jax.tree.map(lambda total, value: total + masked_sum(value), total, values)

    def evaluate(state: Any) -> dict[str, float]:
        total, size = None, task.config.batch_size // task.parts
        here, count = jax.process_index(), jax.process_count()
        for batch in epoch(source, size, process_index=here, process_count=count):
            batch = put_batch(batch, mesh)
            mask = batch.pop("mask")
            if total is None:
                values = jax.eval_shape(task.eval_step, state, batch, frozen or {})
                total = {name: jnp.zeros(()) for name in values}
            total = add(total, state, batch, mask, frozen or {})
        return {f"val_{name}": float(x) / len(source) for name, x in (total or {}).items()}

    return evaluate


class Speed:
    """Images a second, share of the peak the chips make (MFU), share of time waited for data.

    The clock starts after the first step, which compiles. What is measured is the pace at which the
    devices end earlier steps: up to the first log nothing waits for them, so it has no figures.
    """

    def __init__(self, task: Task):
        self._task, self._peak = task, peak_flops(jax.devices()[0].device_kind)
        self._steps, self._since, self._waited = -1, time.monotonic(), 0.0
        self._dispatched = False  # whether steps are under way that a log waits for

    def count(self, values: dict) -> None:
        """Counts a step, whose metrics these are."""
        self._steps += 1
        if self._steps == 0:
            jax.block_until_ready(values)
            self._since, self._waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextlib.contextmanager
    def excluding(self):
        """Around what is no training."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def up_to(self, step: int) -> dict[str, Any]:
        """The figures of the steps since the last call; none of no step."""
        if self._steps <= 0:
            return {}
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._steps * self._task.config.batch_size / seconds
        found = {"images_per_second": rate, "data_wait": self._waited / seconds}
        if self._peak and (flops := self._task.image_flops(step)):
            found["mfu"] = rate * flops / self._peak / jax.device_count()
        found, self._dispatched = found if self._dispatched else {}, True
        self._steps, self._since, self._waited = 0, time.monotonic(), 0.0
        return found


class Trace:
    """A profiler trace of steps `first` ... `first + count - 1`, for TensorBoard or xprof."""

    def __init__(self, directory: str | PurePath, first: int, count: int):
        self._folder = str(epath.Path(directory).parent / "tensorboard")
        self._first, self._end, self._on = first, first + count, False

    def __enter__(self):
        return self

    def __call__(self, step: int, state: Any) -> None:
        """Starts or stops ahead of `step`, once the devices have made the `state` before it."""
        if step == self._first and self._end > self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif step == self._end and self._on:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *error: Any) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
