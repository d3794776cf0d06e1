"""Files appear whole, and what failed leaves nothing; one process at a time has a lock."""

import fcntl
import os
import shutil
import subprocess
import sys
import types

import pytest
from etils import epath

from var_jax import BadInput
from var_jax.data.records import begin
from var_jax.tools.cli import explain
from var_jax.tools.files import acquire_lock, read_json, release_locks, replacing
from var_jax.tools.npz import load_npz


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as beside:
        beside.write_text("whole")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), replacing(path) as beside:
        beside.write_text("ha")
        raise OSError("the disk is full")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("IO: No space left on device")]
)
def test_a_full_disk_is_told_with_its_path(tmp_path, error):
    with pytest.raises(OSError) as raised, replacing(tmp_path / "a.txt"):
        raise error
    assert explain(raised.value)[1].startswith(f"the disk holding {tmp_path} is full; free some")


def test_a_full_disk_without_a_path_is_told_with_the_full_flag(tmp_path, monkeypatch):
    """What writes to an open file does not know its name."""
    usage = lambda place: types.SimpleNamespace(free=0 if place == str(tmp_path) else 2**30)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    _, sentence = explain(OSError(28, "No space left on device"), ["--num=4", f"--out={tmp_path}"])
    assert sentence.startswith(f"the disk holding {tmp_path} is full; free some")


@pytest.mark.parametrize("name", ["a.json", "a.npz", "a.txt"])
def test_a_pipe_is_no_file(tmp_path, name):
    """To open one would wait for ever."""
    os.mkfifo(tmp_path / name)
    for read in (read_json, load_npz, lambda path: path.read_bytes(), lambda path: path.open("a")):
        with pytest.raises(BadInput, match="is no file"):
            read(epath.Path(tmp_path / name))


def test_a_lock_lasts_until_its_process_ends(tmp_path):
    path = tmp_path / "new" / ".lock"
    code = "import sys; from var_jax.tools.files import acquire_lock as acquire;"
    code += "print(acquire(sys.argv[1]), flush=True); sys.stdin.read()"
    ask = [sys.executable, "-c", code, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(ask, **pipes) as other:
        assert other.stdout.readline() == b"True\n"
        assert not acquire_lock(path)
        other.kill()
    assert acquire_lock(path) and acquire_lock(path)  # again in the same process
    assert subprocess.run(ask, input=b"", capture_output=True).stdout == b"False\n"


def test_a_lock_is_of_the_file_that_others_see(tmp_path, monkeypatch):
    """Its owner gives it back, and removes the file, between our opening and our locking it."""
    path, lockf, looks = tmp_path / ".lock", fcntl.lockf, []

    def late(file, how):
        if not looks:
            path.unlink()
        looks.append(os.fstat(file).st_ino)
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    assert acquire_lock(path) and looks[1:] == [path.stat().st_ino]
    release_locks()
    assert not path.exists()


def test_a_manifest_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path, text):
        path.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(epath.Path(tmp_path).__class__, "write_text", full)
    with pytest.raises(OSError) as raised:
        begin(epath.Path(tmp_path), {"kind": "codes"})
    assert "holding" in explain(raised.value)[1] and not list(tmp_path.iterdir())
