"""Sampling and encoding, killed at random moments, by one process or two: not a byte is other."""

import contextlib
import random
import signal
import subprocess
import time

import pytest
from running import run_alone, start_several

KILLS = 5
COMMANDS = {
    "sample": ("--num", 300, "--batch_size", 8, "--out"),
    "encode": ("--images", "emoji", "--copies", 2, "--batch_size", 16, "--out"),
}


def files(folder):
    """Name and bytes of all that a command left."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def survive(name, flags, out, processes, seconds, seed=0):
    """Runs a command until it ends, killed `KILLS` times on the way, and again by others."""
    moments = random.Random(seed)
    for killed in range(KILLS + 1):
        several = processes if killed % 2 == 0 else 1
        running = start_several(several, name, *flags, out, devices=4 // several)
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait = moments.uniform(0.2, 1) * seconds if killed < KILLS else 500
            running[-1].wait(wait)
        for process in running if killed < KILLS else ():
            process.send_signal(signal.SIGKILL)
        outputs = [process.communicate(timeout=500) for process in running]
        if killed == KILLS:
            assert [process.returncode for process in running] == [0] * several, outputs


@pytest.mark.slow
@pytest.mark.parametrize("name, processes", [("sample", 1), ("sample", 2), ("encode", 2)])
def test_kills_lose_nothing(name, processes, untrained, tmp_path):
    flags = ("--checkpoint", untrained, *COMMANDS[name])
    seconds = 0.0
    for folder in ("first", "calm"):  # the second time nothing is compiled
        started = time.monotonic()
        code, _, err = run_alone(name, *flags, tmp_path / folder, devices=4)
        assert code == 0, err
        seconds = time.monotonic() - started
    survive(name, flags, tmp_path / "stormy", processes, seconds)
    assert files(tmp_path / "stormy") == files(tmp_path / "calm")
