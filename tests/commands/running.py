"""Commands run by tests: in this process, or in one of their own where it is to be stopped."""

import contextlib
import importlib
import io
import os
import pathlib
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


def start(name, *flags, **kwargs):
    """A command as a process of its own, on one device."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", f"var_jax.{name}", *map(str, flags)]
    return subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


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
