"""Several processes over loopback end with the numbers of one."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "commands" / "tiny.py"


def train(workdir, processes, *flags):
    """Runs the command as so many processes of 4 / `processes` virtual devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    argv = [sys.executable, "-m", "var_jax.train", "--config", TINY, "--workdir", workdir, *flags]
    env = {
        "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
    }  # fmt: skip
    several = lambda i: (
        ["--coordinator", address, "--num_processes", processes, "--process_id", i]
        if processes > 1
        else []
    )
    running = [
        subprocess.Popen(
            [*map(str, argv), *map(str, several(i))], env=env, stderr=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]
    errors = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, errors
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {(r["stage"], r["step"]): r["loss"] for r in lines if "loss" in r}


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    flags = ("--config.train_transformer.steps=5", "--config.mesh.fsdp=2")
    alone, together = train(tmp_path / "1", 1, *flags), train(tmp_path / "2", 2, *flags)
    assert ("transformer", 5) in alone and together.keys() == alone.keys()
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=2e-4)
