"""A signal ends a process within seconds, or at the next point where its work is saved."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from var_jax.tools import ending

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """if True:
    import hashlib, os, sys, threading, time
    from var_jax.tools import ending

    number, where, *others = int(sys.argv[1]), *sys.argv[2:]
    ending.GRACE = 5.0 if others else 0.2
    signalled = lambda after: threading.Timer(after, os.kill, (os.getpid(), number)).start()
    # As in a compiler, Python does not run meanwhile: some 100 s.
    compute = lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    with ending.listening():
        signalled(0.2)
        if where == "python":
            try:
                time.sleep(30)
            except KeyboardInterrupt:
                print("interrupted in Python")
        elif where == "compiler":
            compute()
        elif where == "hook":
            with ending.unsaved(), ending.unsaved(False):
                compute()
        elif where == "step":
            with ending.unsaved():
                while not ending.stop_requested():
                    time.sleep(0.01)
                for other in others:  # amid the save
                    os.kill(os.getpid(), int(other))
                time.sleep(0.5)
            print("saved")
        elif where == "twice":
            signalled(1.0)
            with ending.unsaved():
                compute()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "where, ends",
    {
        "python": (0, "interrupted in Python\n", ""),
        "compiler": (130, "", "interrupted\n"),
        "hook": (130, "", "interrupted\n"),
        "step": (0, "saved\n", "stopping: this step ends, then it saves\n"),
        "twice": (130, "", "stopping: this step ends, then it saves\ninterrupted\n"),
    }.items(),
)
def test_a_signal(number, where, ends):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", SCRIPT, str(int(number)), where]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == ends


TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


@pytest.mark.parametrize(
    "first, second, saved",
    [(TERM, HUP, True), (HUP, HUP, True), (INT, TERM, True), (TERM, INT, True), (INT, INT, False)],
)
def test_two_signals_close_together(first, second, saved):
    """A terminal that closes, or a batch system, sends several; only Ctrl-C twice is impatience."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", SCRIPT, str(int(first)), "step", str(int(second))]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == ((0, "saved\n") if saved else (130, ""))


def test_nohup_is_respected():
    """Who starts a command with nohup wants it to outlive the terminal."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SCRIPT}"
    code = code.replace("time.sleep(30)", "time.sleep(0.5)")
    argv = [sys.executable, "-c", code, str(int(signal.SIGHUP)), "python"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_an_interrupt_while_a_command_is_imported(tmp_path, seconds):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-X", "importtime", "-m", "var_jax.train", "--config", "emoji"]
    process = subprocess.Popen(
        argv, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    for line in process.stderr:  # tells when ours has begun
        if line.endswith("var_jax.tools.ending\n"):
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and said.endswith("interrupted\n")
    assert "Traceback" not in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, whole, expected",
    [
        (["-m"], ["python", "-m", "var_jax.train", "--config", "emoji"], True),
        (["-m", "train"], ["python", "-X", "dev", "-m", "var_jax", "train"], True),
        (["-m"], ["python", "-m", "app.main", "-m", "var_jax"], False),  # which imports us
        (["-c"], ["python", "-c", "import var_jax"], False),
        (["train.py"], ["python", "train.py", "-m", "var_jax"], False),
    ],
)
def test_only_commands_of_ours_are_heard_from_the_start(argv, whole, expected):
    assert ending.is_command(argv, whole) is expected


def test_the_end_of_the_interpreter_waits_for_no_thread():
    """Python 3.13 ends daemon threads without a word, also the one that listens."""
    text = """
import sys, threading
from var_jax.tools import ending
listening = ending.listening()
listening.__enter__()
def never(thread): raise AssertionError("a thread is waited for")
threading.Thread.join, sys.is_finalizing = never, lambda: True
listening.__exit__(None, None, None)
"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
