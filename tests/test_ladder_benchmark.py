"""benchmarks/ladder.py, from images to a point of a law, stopped amid a training and continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_versus_benchmark import write_images

from var_jax.training.results import read_rows

ROOT = Path(__file__).parents[1]
STEPS = 600
SMALL = """
import os, ladder
from var_jax.tools import cli
load = ladder.load_config
def small(*args):
    config = load(*args)
    config.data.source = os.environ["SOURCE"]
    config.every.log = 1
    if config.train_tokenizer.steps:
        config.train_tokenizer.update(steps=2, warmup_steps=1)
    return config
ladder.load_config = small
cli.run(ladder.main, ladder.define_flags)
"""


def start(images, out):
    paths = os.pathsep.join((str(ROOT / "benchmarks"), str(ROOT)))
    env = {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "1", "SOURCE": f"idx:{images}"}
    flags = ("--depths=1", "--two_seeds=", f"--steps={STEPS}", f"--out={out}")
    command = [sys.executable, "-c", SMALL, *flags]
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=os.environ | env, text=True, **to)


@pytest.mark.slow
def test_a_ladder_that_was_stopped_continues(tmp_path):
    write_images(tmp_path)
    out = tmp_path / "out"
    run = out / "d1-seed0"
    stopped = start(tmp_path, out)
    try:
        deadline = time.monotonic() + 400
        while not (metrics := run / "metrics.jsonl").exists() or not metrics.read_text():
            assert stopped.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        stopped.send_signal(signal.SIGTERM)
        said, _ = stopped.communicate(timeout=200)
        assert stopped.returncode == 130, said
    finally:
        stopped.kill()
    assert not (run / "summary.json").exists()
    tokens = [*(out / "tokens-0").glob("*.array_record")]
    times = [path.stat().st_mtime_ns for path in tokens]
    begun = metrics.read_text()

    again = start(tmp_path, out)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0 and "d1-seed0: validation loss " in said, said
    assert metrics.read_text().startswith(begun) and "transformer: going on from step" in said
    assert tokens and [path.stat().st_mtime_ns for path in tokens] == times
    (*_, last) = read_rows([str(run)])
    assert last["step"] == last["steps"] == STEPS and last["images"] == 32 * STEPS
