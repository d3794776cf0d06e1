"""Commands run by tests: in this process, or in one of their own where it is to be stopped."""

import contextlib
import importlib
import io
import os
import pathlib
import socket
import subprocess
import sys
import time

from var_jax.tools import cli

ROOT = pathlib.Path(__file__).parents[2]
TINY = pathlib.Path(__file__).parent / "tiny.py"


def run(name, *flags):
    """Exit code, stdout and stderr of a command that runs in this process."""
    module = importlib.import_module(f"var_jax.{name}")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.call(module.main, module.define_flags, [str(flag) for flag in flags])
    return code, out.getvalue(), err.getvalue()


def complaint(name, *flags):
    """The one sentence on stderr of a command that must refuse its flags."""
    code, _, err = run(name, *flags)
    assert (code, len(err.splitlines())) == (2, 1), err
    return err


def start(name, *flags, devices=1, patient=True, **kwargs):
    """A command as a process of its own, on so many virtual devices."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    program = ["-m", f"var_jax.{name}"] if patient else [TINY.with_name("impatient.py"), name]
    argv = [sys.executable, *program, *map(str, flags)]
    return subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def start_several(count, name, *flags, devices=4):
    """A command as so many processes that meet over loopback."""
    if count == 1:
        return [start(name, *flags, devices=devices)]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    place = ("--coordinator", address, "--num_processes", count, "--process_id")
    return [start(name, *flags, *place, i, devices=devices) for i in range(count)]


def run_alone(name, *flags, **kwargs):
    """Like `run`, as a process of its own."""
    process = start(name, *flags, **kwargs)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def wait_for(path, seconds=240):
    """Waits until a path exists."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)
