"""Locks, metrics and files in a bucket that others use and that fails now and then."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from etils import epath
from server import LOST, RESET

import var_jax
from var_jax import BadInput, Failure
from var_jax.checkpoints import storage
from var_jax.tools import buckets, logs
from var_jax.tools.files import replacing

LOCK = epath.Path("gs://bucket/run/.lock")
HOLD = """if True:
    import sys, time
    from etils import epath
    from var_jax.tools import buckets
    buckets.REFRESHED = 0.1
    print(bool(buckets.lock_object(epath.Path(sys.argv[1]))), flush=True)
    time.sleep(float(sys.argv[2]))
"""


def others():
    """The lock of a process on another machine."""
    return json.dumps({"host": "far", "pid": 1, "machine": "other", "since": 0}).encode()


def at_once(server, kind, part):
    """One fault, at the first request whose path has `part`."""
    left = [kind]
    server.fault = lambda method, path: left.pop() if left and part in path else None


@pytest.fixture
def quick(monkeypatch):
    """Locks that live and die within a second."""
    monkeypatch.setattr(buckets, "REFRESHED", 0.1)
    monkeypatch.setattr(buckets, "DEAD", 0.5)


def test_a_lock_in_a_bucket_has_one_owner_at_a_time(server, quick):
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, LOCK, "60"], stdout=pipe) as other:
        assert other.stdout.readline() == b"True\n"
        assert buckets.lock_object(LOCK) is None  # it is refreshed
        other.kill()
        other.wait()
    started = time.monotonic()
    release = buckets.lock_object(LOCK)  # of this machine, and ended
    assert release and time.monotonic() - started < buckets.DEAD
    release()
    assert not server.buckets["bucket"]


def test_a_lock_of_another_machine_dies_with_its_owner(server, quick, capsys):
    server.store("bucket", "run/.lock", others())
    release = buckets.lock_object(LOCK)
    assert release and "held by" in capsys.readouterr().err
    release()


def test_of_two_that_find_a_dead_lock_one_gets_it(server, quick):
    server.store("bucket", "run/.lock", others())
    found = []
    ask = [threading.Thread(target=lambda: found.append(buckets.lock_object(LOCK))) for _ in "ab"]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert sorted(map(bool, found)) == [False, True]
    next(filter(None, found))()


def test_who_has_lost_its_lock_ends(server):
    ask = [sys.executable, "-c", HOLD, LOCK, "60"]
    with subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"True\n"
        server.store("bucket", "run/.lock", others())
        assert other.wait(30) == 1
        assert b"another process has taken" in other.stderr.read()


@pytest.mark.parametrize("kind", [503, 429, RESET, LOST])
def test_a_lock_outlives_a_fault(server, kind):
    at_once(server, kind, ".lock")
    release = buckets.lock_object(LOCK)
    assert release
    release()


def test_a_lock_that_was_removed_by_hand_comes_back(server, quick):
    release = buckets.lock_object(LOCK)
    server.buckets["bucket"].clear()
    time.sleep(0.5)
    assert "run/.lock" in server.buckets["bucket"]
    release()
    time.sleep(0.3)
    assert not server.buckets["bucket"]


def record(metrics, first, last):
    for step in range(first, last + 1):
        metrics.write("tokenizer", step, loss=1 / step)


def test_metrics_reach_a_bucket_without_a_request_a_record(server, tmp_path):
    whole = logs.Metrics(tmp_path)
    record(whole, 1, 60)
    stopped = logs.Metrics("gs://bucket/run")
    server.log.clear()
    record(stopped, 1, 45)
    assert not server.log
    stopped.flush()
    assert len(server.log) == 2  # metrics.jsonl and TensorBoard's file
    record(stopped, 46, 50)  # and killed
    resumed = logs.Metrics("gs://bucket/run")
    resumed.rewind("tokenizer", 40)
    record(resumed, 41, 60)
    resumed.close()
    path = epath.Path("gs://bucket/run/metrics.jsonl")
    assert path.read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()
    assert len([key for key in server.buckets["bucket"] if "run/tensorboard/" in key]) == 2


def test_metrics_are_copied_by_and_by(server, monkeypatch):
    monkeypatch.setattr(buckets, "COPIED", 0.05)
    metrics = logs.Metrics("gs://bucket/run")
    for step in (1, 2):
        record(metrics, step, step)
        end = time.monotonic() + 60
        while len(logs.read_metrics("gs://bucket/run")) < step:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_what_is_recorded_while_others_are_copied_is_copied_too(server, monkeypatch):
    monkeypatch.setattr(buckets, "COPIED", 0.05)
    copying, go = threading.Event(), threading.Event()
    upload = buckets.Mirror._upload

    def slow(mirror, path, target):
        upload(mirror, path, target)
        copying.set()
        go.wait()

    monkeypatch.setattr(buckets.Mirror, "_upload", slow)
    metrics = logs.Metrics("gs://bucket/run")
    record(metrics, 1, 1)
    copying.wait()
    record(metrics, 2, 2)
    go.set()
    end = time.monotonic() + 60
    while len(logs.read_metrics("gs://bucket/run")) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_metrics_that_a_bucket_refuses_end_no_run(server, capsys):
    metrics = logs.Metrics("gs://bucket/run")
    server.fault = lambda method, path: 403 if method == "POST" else None
    record(metrics, 1, 3)
    metrics.close()
    assert "warning: gs://bucket/run" in capsys.readouterr().err
    server.fault = lambda method, path: None
    metrics.close()
    assert len(logs.read_metrics("gs://bucket/run")) == 3


def test_a_file_in_a_bucket_is_whole_or_as_before(server):
    path = epath.Path("gs://bucket/a/b.txt")
    with replacing(path) as beside:
        beside.write_text("whole")
        assert not server.buckets["bucket"]
    with pytest.raises(OSError, match="full"), replacing(path) as beside:
        beside.write_text("ha")
        raise OSError("the disk is full")
    assert path.read_text() == "whole" and list(server.buckets["bucket"]) == ["a/b.txt"]
    assert len([1 for method, _ in server.log if method != "GET"]) == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [(404, "no such bucket"), (401, "no valid credentials"), (403, "no permission")],
)
def test_a_bucket_that_is_not_ours_is_refused(server, fault, says):
    server.fault = lambda method, path: fault
    with pytest.raises(BadInput, match=says) as error:
        buckets.check_bucket(f"bucket-{fault}")
    assert "\n" not in str(error.value) and f"gs://bucket-{fault}" in str(error.value)


def test_a_bucket_out_of_reach_is_told_by_the_library(monkeypatch):
    def call(*args, **options):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(buckets, "filesystem", lambda: SimpleNamespace(call=call))
    with pytest.raises(Failure, match=r"gs://far cannot be reached: name or service not known\."):
        var_jax.load("gs://far/checkpoint")


def test_a_folder_that_may_not_be_written_is_refused(server):
    server.fault = lambda method, path: None if method == "GET" else 403
    with pytest.raises(BadInput, match="gs://bucket/run cannot be written"):
        buckets.lock_object(LOCK)


def test_what_may_pass_is_tried_again(monkeypatch):
    pauses = []
    monkeypatch.setattr(buckets.time, "sleep", pauses.append)
    errors = [ConnectionResetError(104, "reset"), TimeoutError(), OSError(5, "input/output error")]

    def call():
        if errors:
            raise errors.pop()
        return "read"

    assert buckets.retrying(call) == "read" and len(pauses) == 3
    for lasting in (
        FileNotFoundError("x"),
        OSError(28, "full"),
        OSError("Forbidden: x"),
        KeyError(),
    ):
        errors.append(lasting)
        with pytest.raises(type(lasting)):
            buckets.retrying(call)
    assert len(pauses) == 3
    errors.extend([TimeoutError()] * 9)
    with pytest.raises(TimeoutError):
        buckets.retrying(call)
    assert len(errors) == 4


def test_a_bucket_that_is_lost_is_told_in_time(monkeypatch):
    now, tries = [0.0], []
    monkeypatch.setattr(buckets.time, "sleep", lambda pause: now.append(now[-1] + pause))

    def call():
        tries.append(now[-1])
        now.append(now[-1] + 64)  # gcsfs repeats each request by itself
        raise TimeoutError

    with pytest.raises(TimeoutError):
        buckets.retrying(call, lambda: now[-1])
    assert len(tries) == 2 and max(tries) < buckets.LAST_TRY
    assert now[-1] < buckets.LAST_TRY + 64


def test_damage_in_a_bucket_is_found_by_one_listing(server, tmp_path):
    folder = epath.Path("gs://bucket/c")
    for name, data in {"a": b"one", "d/b": b"two", "d/c": b""}.items():
        (folder / name).write_bytes(data)
    server.log.clear()
    storage.record_files(folder)
    assert [method for method, _ in server.log if method == "GET"] == ["GET"]
    server.log.clear()
    assert storage.damage(folder) == ""
    # How often gcsfs asks for an object's metadata depends on timing; these two do not.
    assert sum("/download/" in path for _, path in server.log) == 1
    assert sum("delimiter=&" in path for _, path in server.log) == 1
    for path in ("a", "d/b", "d/c", "files.json"):  # a copy on disk is known by the same sums
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    assert storage.damage(epath.Path(tmp_path)) == ""
    for place in (folder, epath.Path(tmp_path)):
        (place / "d/b").write_bytes(b"twO")
        assert storage.damage(place) == "d/b fails its checksum"
        (place / "d/b").write_bytes(b"tw")
        assert storage.damage(place) == "d/b has 2 bytes; expected 3"
        (place / "d/b").unlink()
        assert storage.damage(place) == "d/b is missing"
