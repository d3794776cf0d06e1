"""Several processes stop together, whichever is told to and whatever they are at."""

import json
import re
import signal
import time

import pytest
from test_hosts import TINY, launch

pytestmark = pytest.mark.slow
LONG = (
    "--config", TINY, "--config.mesh.fsdp=2", "--config.train_transformer.steps=100000",
    "--config.every.save=90000",
)  # fmt: skip
SILENT = ("--config.every.evaluate=0", "--config.every.sample=0")
BUSY = (
    "--config.every.evaluate=1",
    "--config.every.sample=1",
)  # seldom in a step


@pytest.fixture(autouse=True)
def compile_alike(monkeypatch):
    """Of programs on disk only process 0 has all: it would wait for the other too long."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


def ended(running):
    """Exit codes and what was said on stderr."""
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()  # those that did not end
    return [process.returncode for process in running], said


def wait_until(running, is_so):
    while not is_so():
        assert all(process.poll() is None for process in running), ended(running)
        time.sleep(0.1)


@pytest.mark.parametrize("number, flags", [(signal.SIGTERM, BUSY), (signal.SIGINT, SILENT)])
def test_in_the_second_training(tmp_path, number, flags):
    """Its steps are numbered anew, and the notice is not lost."""
    running = launch(2, "train", "--workdir", tmp_path, *LONG, *flags)
    metrics = tmp_path / "metrics.jsonl"
    wait_until(running, lambda: metrics.exists() and '"transformer"' in metrics.read_text())
    time.sleep(1)
    signalled = time.monotonic()
    running[1].send_signal(number)
    codes, said = ended(running)
    assert codes == [130, 130], said
    assert time.monotonic() - signalled < 60
    saved = max(int(p.name) for p in (tmp_path / "transformer").iterdir() if p.name.isdecimal())
    steps = [json.loads(line)["step"] for line in metrics.open() if '"loss"' in line]
    assert saved in (steps[-1], steps[-1] + 1)  # no step is lost
    if found := re.search(r"goes on from step (\d+)", said[0]):
        assert int(found[1]) == saved


def test_while_compiling(tmp_path):
    running = launch(2, "train", "--workdir", tmp_path, *LONG, *SILENT)
    wait_until(running, lambda: (tmp_path / "tokenizer").exists())
    time.sleep(1)
    running[1].send_signal(signal.SIGHUP)
    signalled = time.monotonic()
    codes, said = ended(running)
    assert codes == [130, 130] and time.monotonic() - signalled < 30
    assert [text.splitlines()[-1] for text in said] == ["interrupted"] * 2


def test_what_one_process_refuses_ends_both_at_once(tmp_path):
    nowhere = [(), ("--config.data.source=/nowhere",)]
    running = launch(2, "train", "--workdir", tmp_path / "work", *LONG, each=nowhere)
    codes, said = ended(running)
    sentence = "error: data source '/nowhere': there is no such folder. (process 1 of 2)"
    assert codes == [2, 2] and [text.splitlines()[-1] for text in said] == [sentence] * 2
    assert not (tmp_path / "work").exists()


def test_a_work_directory_that_is_not_shared_is_refused(tmp_path):
    own = [("--workdir", tmp_path / name) for name in "ab"]
    codes, said = ended(launch(2, "train", *LONG, each=own))
    assert codes == [2, 2]
    assert all("is not shared by all hosts: process 1 does not see" in text for text in said)
    assert not list(tmp_path.iterdir())
