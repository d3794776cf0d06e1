"""The loop resumes exactly and stops on a loss that is not a number."""

import dataclasses
import functools
import json
import math
import signal

import chex
import jax
import pytest
from jax.sharding import AxisType
from test_tasks import TOKENIZER, TRAIN_TOKENIZER

from var_jax import BadInput
from var_jax.config import EveryConfig
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches
from var_jax.data.sources import Emoji
from var_jax.sharding.mesh import AXES, make_mesh
from var_jax.tools.logs import Metrics
from var_jax.training import loop
from var_jax.training.tokenizer import tokenizer_task

CONFIG = dataclasses.replace(TRAIN_TOKENIZER, steps=9)
EVERY = EveryConfig(log=1, save=2)


@functools.cache
def task_of(config):
    """One task, so one compiled step, for all runs of a config."""
    return tokenizer_task(TOKENIZER, config)


def train(directory, config, until=None, signalled=None):
    """Runs the loop; in a hook it ends, as by a full disk, or gets a Ctrl-C."""
    task, metrics = task_of(config), Metrics(directory)
    source = Emoji("train", 16)
    stream = batches(source, batch_size=16, seed=0, augment=augment_items(shift=2))

    def run(step, state):
        if step == until:
            raise OSError
        if step == signalled:
            signal.raise_signal(signal.SIGINT)
        return {"seen": step}

    one = jax.devices()[:1]
    mesh = jax.make_mesh((1, 1, 1), AXES, (AxisType.Explicit,) * 3, devices=one)
    with jax.set_mesh(mesh):
        state = loop.run(
            task, stream, mesh=mesh, seed=0, directory=directory / "ckpt", metrics=metrics,
            every=EVERY, hooks=(loop.Hook("often", 4, run), loop.Hook("seldom", 6, lambda *_: {})),
        )  # fmt: skip
        return jax.device_get(state)


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


@pytest.mark.parametrize(("signalled", "saved"), [(4, 5), (9, 9)])
def test_an_interrupt_during_a_hook_saves_and_ends(tmp_path, signalled, saved):
    with pytest.raises(KeyboardInterrupt):  # after the last step too: no training begins after it
        train(tmp_path, CONFIG, signalled=signalled)
    names = [path.name for path in (tmp_path / "ckpt").iterdir()]
    assert max(int(name) for name in names if name.isdecimal()) == saved


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(BadInput, match="of tokenizer is nan"):
        train(tmp_path, dataclasses.replace(CONFIG, learning_rate=math.inf))


def test_speed_counts_no_compiling(tmp_path):
    train(tmp_path, CONFIG)
    records = [json.loads(line) for line in (tmp_path / "speed.jsonl").open()]
    assert [r["step"] for r in records] == list(range(2, 10))  # the first step compiles
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
