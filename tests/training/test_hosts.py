"""Several processes over loopback end with the numbers of one, and can hand over to others."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from etils import epath

from var_jax.data.records import read_manifest
from var_jax.data.token_cache import KIND, RECORD, records_of

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "commands" / "tiny.py"
FLAGS = ("--config.train_transformer.steps=5", "--config.mesh.fsdp=2")


def launch(processes, command, *flags, each=None):
    """Starts a command as so many processes of 4 / `processes` virtual devices each.

    `each` holds flags that only one of them gets.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    argv = [sys.executable, TINY.with_name("impatient.py"), command, *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(4 // processes)}
    several = lambda i: (
        ["--coordinator", address, "--num_processes", processes, "--process_id", i]
        if processes > 1
        else []
    )
    own = lambda i: [*several(i), *(each[i] if each else ())]
    return [
        subprocess.Popen(
            [*map(str, argv), *map(str, own(i))], env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def together(processes, command, *flags):
    """What the processes of `launch` print."""
    running = launch(processes, command, *flags)
    outputs = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    return [out for out, _ in outputs]


def train(workdir, processes, *flags):
    """The losses of a run as so many processes."""
    together(processes, "train", "--config", TINY, "--workdir", workdir, *flags)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {(r["stage"], r["step"]): r["loss"] for r in lines if "loss" in r}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of a run as one process."""
    return train(tmp_path_factory.mktemp("alone"), 1, *FLAGS)


@pytest.mark.slow
def test_processes_equal_one_and_continue_each_other(tmp_path, alone):
    losses = train(tmp_path, 2, *FLAGS)
    assert ("transformer", 5) in alone
    check_equal(losses, alone)
    assert "class agreement, samples / validation" in json.loads(
        (tmp_path / "summary.json").read_text()
    )
    assert (tmp_path / "samples.png").exists()
    for processes, mesh in ((4, "fsdp=4"), (1, "tensor=2")):
        shutil.rmtree(tmp_path / "transformer" / "5")  # as if stopped after step 4
        flags = "--config.mesh.fsdp=1", f"--config.mesh.{mesh}"
        check_equal(train(tmp_path, processes, *FLAGS, *flags), alone)


@pytest.mark.slow
def test_hosts_share_the_work_of_a_token_cache(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(300):  # three shards to train on, one held out
            image = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            image.save(tmp_path / "images" / label / f"{i}.png")
    flags = ("--checkpoint", "emoji", "--images", tmp_path / "images", "--out")
    together(1, "encode", *flags, tmp_path / "alone")
    said = together(2, "encode", *flags, tmp_path / "shared")
    assert any("codes of 600 crops of 600 images" in out for out in said)
    names = [path.name for path in sorted((tmp_path / "alone").iterdir())]
    assert len(names) == 5  # four shards and the manifest
    assert names == [path.name for path in sorted((tmp_path / "shared").iterdir())]
    alone, shared = (codes(tmp_path / folder) for folder in ("alone", "shared"))
    np.testing.assert_array_equal(alone[:, 0], shared[:, 0])  # the classes, in the same order
    # Batches are split otherwise: of this noise a few codes are others, where two are as near.
    assert (alone == shared).all(axis=1).mean() > 0.98


def codes(folder):
    """The records of a cache's training images: class and tokens."""
    manifest = read_manifest(epath.Path(folder), KIND)
    records = records_of(manifest, str(folder), "train")
    return np.stack([np.frombuffer(records[i], RECORD) for i in range(len(records))])


def check_equal(losses, others):
    """Within what the order of sums makes of float32 in the few steps of a run."""
    assert losses.keys() == others.keys()
    np.testing.assert_allclose(list(losses.values()), list(others.values()), rtol=2e-4)
