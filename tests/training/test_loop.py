"""The loop resumes exactly, and skips steps that are not finite."""

import dataclasses
import functools
import json
import math
import signal
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from test_tasks import TOKENIZER, TRAIN_TOKENIZER

from var_jax import BadInput
from var_jax.config import EveryConfig
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches
from var_jax.data.sources import Emoji
from var_jax.sharding.mesh import AXES, make_mesh, replicated
from var_jax.tools.logs import Metrics
from var_jax.training import loop
from var_jax.training.state import Learner, apply_gradients, start_learner
from var_jax.training.task import Task
from var_jax.training.tokenizer import tokenizer_task

CONFIG = dataclasses.replace(TRAIN_TOKENIZER, steps=9)
EVERY = EveryConfig(log=1, save=2)


@functools.cache
def task_of(config):
    """One task, so one compiled step, for all runs of a config."""
    return tokenizer_task(TOKENIZER, config)


def train(
    directory, config, until=None, signalled=None, task=None, hooks=None, mesh_shape=(1, 1, 1)
):
    """Runs the loop; in a hook it ends, as by a full disk, or gets a Ctrl-C."""
    task, metrics = task or task_of(config), Metrics(directory)
    source = Emoji("train", 16)
    stream = batches(source, batch_size=16, seed=0, augment=augment_items(shift=2))

    def run(step, state):
        if step == until:
            raise OSError
        if step == signalled:
            signal.raise_signal(signal.SIGINT)
        return {"seen": step}

    both = loop.Hook("often", 4, run), loop.Hook("seldom", 6, lambda *_: {})
    devices = jax.devices()[: math.prod(mesh_shape)]
    mesh = jax.make_mesh(mesh_shape, AXES, (AxisType.Explicit,) * 3, devices=devices)
    with jax.set_mesh(mesh):
        state = loop.run(
            task, stream, mesh=mesh, seed=0, directory=directory / "ckpt", metrics=metrics,
            every=EVERY, hooks=hooks or both,
        )  # fmt: skip
        return jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("until", [4, 9])
def test_resuming_equals_never_having_stopped(tmp_path, until):
    """Also where it stopped between a step's save and its hooks, each of a period of its own."""
    whole = train(tmp_path / "a", CONFIG)
    with pytest.raises(OSError):
        train(tmp_path / "b", CONFIG, until=until)
    saved = {path.name for path in (tmp_path / "b" / "ckpt").iterdir()}
    assert str(until) in saved  # no step is lost, whatever goes wrong in a hook
    resumed = train(tmp_path / "b", CONFIG)
    chex.assert_trees_all_equal(whole, resumed)
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in "ab"]
    assert logs[0] == logs[1]
    records = [json.loads(line) for line in logs[0].splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 10))
    hooks = [(r["step"], r["hook"]) for r in records if "hook" in r]
    assert hooks == [(4, "often"), (6, "seldom"), (8, "often"), (9, "often"), (9, "seldom")]


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [4, 9])
def test_an_interrupt_during_a_hook_saves_and_ends(tmp_path, signalled):
    with pytest.raises(KeyboardInterrupt):  # after the last step too: no training begins after it
        train(tmp_path, CONFIG, signalled=signalled)
    names = [path.name for path in (tmp_path / "ckpt").iterdir()]
    assert max(int(name) for name in names if name.isdecimal()) == signalled


class ToyState(NamedTuple):
    step: jax.Array
    learner: Learner


def toy_task(bad, steps=60):
    """Learns one number; the gradient of the steps `bad` is not finite."""
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))

    def init(key):
        return ToyState(jnp.zeros((), jnp.int32), start_learner(jnp.ones(()), optimizer, 0.0))

    def train_step(state, batch, frozen, key):
        is_bad = (jnp.array(bad) == state.step + 1).any()
        gradient = jnp.where(is_bad, jnp.nan, state.learner.params)
        learner = apply_gradients(state.learner, gradient, optimizer)
        return ToyState(state.step + 1, learner), {"loss": gradient, "grad_norm": gradient}

    config = dataclasses.replace(CONFIG, steps=steps)
    return Task("toy", config, init, train_step, lambda *_: {}, replicated)


def stop_at(call):
    """A function that ends the loop at this call, as a full disk would."""
    calls = iter(range(1, call + 1))

    def count(self, step):
        if next(calls) == call:
            raise OSError
        return {}

    return count


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, capsys, stopped, monkeypatch):
    bad = (3, 4, *range(10, 29))  # of the second kind 19: one less than too many
    if stopped:
        monkeypatch.setattr(loop.Speed, "up_to", stop_at(27))
        with pytest.raises(OSError):
            train(tmp_path / "a", CONFIG, task=toy_task((*bad, 99)))
        monkeypatch.undo()
    state = train(tmp_path / "a", CONFIG, task=toy_task((*bad, 99)))
    same = train(tmp_path / "b", CONFIG, task=toy_task((99,), steps=60 - len(bad)))
    assert (state.step, same.step) == (60, 39)
    chex.assert_trees_all_equal(state.learner, same.learner)  # as if those steps had not been
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    skipped = {r["step"]: r["skipped"] for r in records if "skipped" in r}
    assert [skipped[step] for step in (2, 3, 4, 9, 28, 60)] == [0, 1, 2, 2, 21, 21]
    assert "toy: skipped, as not finite: 2 steps up to 4\n" in capsys.readouterr().err
    hooks = [r["step"] for r in records if r.get("hook") == "often"]
    assert hooks == [5, 8, 29, *range(32, 61, 4)]  # after steps that are saved: a little late


def test_a_training_that_does_not_recover_ends_with_the_checkpoint_before_it(tmp_path):
    for _ in range(2):  # the same command ends there again
        with pytest.raises(BadInput, match=r"last 20 steps of toy up to step 29 were not finite"):
            train(tmp_path, CONFIG, task=toy_task(tuple(range(10, 60))))
    names = [path.name for path in (tmp_path / "ckpt").iterdir()]
    assert sorted(int(name) for name in names if name.isdecimal()) == [4, 6, 8]


def test_a_figure_of_validation_that_is_not_finite_is_told(tmp_path, capsys):
    nothing = loop.Hook("validation", 0, lambda *_: {"val_loss": math.nan, "val_psnr": 3.0})
    train(tmp_path, CONFIG, task=toy_task((99,), steps=3), hooks=(nothing,))
    assert "toy: val_loss is nan at step 3" in capsys.readouterr().err
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"stage": "toy", "step": 3, "hook": "validation", "val_psnr": 3.0}


@pytest.mark.slow
def test_speed_counts_no_compiling(tmp_path):
    train(tmp_path, CONFIG)
    records = [json.loads(line) for line in (tmp_path / "speed.jsonl").open()]
    # The first step compiles; up to the next log nothing waits for the devices.
    assert [r["step"] for r in records] == list(range(3, 10))
    assert all(r["images_per_second"] > 0 and 0 <= r["data_wait"] <= 1 for r in records)


def test_validation_is_compiled_once():
    """Traced once for shapes and once for the program, whatever the number of calls."""
    task, traces = task_of(CONFIG), []

    def eval_step(state, batch, frozen):
        traces.append(1)
        return {"level": batch["image"].astype("float32").mean((1, 2, 3)) + state}

    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        source = Emoji("validation", 16)  # 194 images: the last batch of 16 is padded
        evaluate = loop.make_evaluation(task._replace(eval_step=eval_step), source, mesh=mesh)
        found = [evaluate(state)["val_level"] for state in (0.0, 0.0, 1.0)]
    assert len(traces) <= 4
    assert found[0] == found[1] == pytest.approx(source.images.mean((1, 2, 3)).mean(), rel=1e-5)
    assert found[2] == pytest.approx(found[0] + 1)


def test_a_trace_holds_its_steps_and_no_others(tmp_path, monkeypatch):
    """Steps are dispatched ahead of the devices, so both ends wait for what came before."""
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", lambda state: calls.append(f"wait {state}"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with loop.Trace(tmp_path / "ckpt", 3, 2) as trace:
        for step in range(1, 8):
            trace(step, f"before {step}")
    assert calls == ["wait before 3", "start", "wait before 5", "stop"]
    with loop.Trace(tmp_path / "ckpt", 7, 2) as trace:
        trace(7, "before 7")  # the training ends inside the trace
    assert calls[4:] == ["wait before 7", "start", "stop"]
