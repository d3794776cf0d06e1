"""Metrics survive kills and resumes; progress speaks at the right rate."""

import resource
import struct

import jax.numpy as jnp
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog

from var_jax.tools import logs


def _run(metrics, first, last):
    for step in range(first, last + 1):
        metrics.write("tokenizer", step, loss=jnp.float32(1 / step), codes=np.int32(step))


def frames(data):
    """What a TFRecord file holds: length, its checksum, so many bytes, their checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_a_resumed_run_leaves_the_file_of_a_run_never_stopped(tmp_path):
    whole = logs.Metrics(tmp_path / "whole")
    whole.write("warmup", 9, loss=3.5)
    _run(whole, 1, 6)

    stopped = logs.Metrics(tmp_path / "stopped")
    stopped.write("warmup", 9, loss=3.5)
    _run(stopped, 1, 5)
    path = tmp_path / "stopped" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "tokenizer", "st')
    resumed = logs.Metrics(tmp_path / "stopped")
    resumed.rewind("tokenizer", 3)
    _run(resumed, 4, 6)

    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    boards = (tmp_path / "stopped" / "tensorboard" / "tokenizer").iterdir()
    newest = max(boards, key=lambda path: path.stat().st_mtime_ns)
    events = [Event.FromString(data) for data in frames(newest.read_bytes())]
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [4]  # TensorBoard forgets the same
    records = logs.read_metrics(tmp_path / "stopped")
    assert records[0] == {"stage": "warmup", "step": 9, "loss": 3.5}
    assert [r["step"] for r in records[1:]] == [1, 2, 3, 4, 5, 6]
    assert isinstance(records[1]["codes"], int)


def test_a_line_cut_before_its_newline_is_no_record(tmp_path):
    metrics = logs.Metrics(tmp_path)
    _run(metrics, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert [r["step"] for r in logs.read_metrics(tmp_path)] == [1]
    metrics.rewind("tokenizer", 2)
    _run(metrics, 2, 2)
    assert [r["step"] for r in logs.read_metrics(tmp_path)] == [1, 2]


DAMAGED = [
    b"text", b"", bytes(40), b"\xff\xfe{}", b"[1]", b"3", b"{}", b"[" * 99999,
    b'{"stage": "tokenizer"}', b'{"stage": 3, "step": 1}', b'{"stage": "tokenizer", "step": "x"}',
]  # fmt: skip


def test_damaged_lines_are_left_out_and_told_once(tmp_path, capsys):
    metrics = logs.Metrics(tmp_path)
    _run(metrics, 1, 1)
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b"\n".join(DAMAGED) + b"\n")
    _run(metrics, 2, 3)
    metrics.rewind("tokenizer", 2)
    assert [r["step"] for r in metrics.records()] == [1, 2]
    assert capsys.readouterr().err == f"{path}: damaged lines left out: {len(DAMAGED)}\n"
    assert path.read_bytes().startswith(good) and path.read_bytes().count(b"\n") == 2


def test_tensorboard_gets_scalars_and_images(tmp_path):
    metrics = logs.Metrics(tmp_path)
    metrics.write("prior", 1, hook="validation", loss=2.0)
    metrics.image("prior", 1, "samples", np.zeros((8, 8, 3), np.uint8))
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").rglob("events*"))
    assert b"prior/loss" in events and b"prior/samples" in events and b"hook" not in events


def test_a_full_disk_ends_tensorboard_only(tmp_path, capsys):
    """It is told once; tensorboardX would lose it in a thread of its own."""
    metrics = logs.Metrics(tmp_path)
    metrics.image("prior", 1, "samples", np.zeros((8, 8, 3), np.uint8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # of one file
        for step in (2, 3):
            metrics.image("prior", step, "samples", noise)
            metrics.write("prior", step, loss=2.0)
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [r["step"] for r in metrics.records()] == [2, 3]
    assert capsys.readouterr().err.splitlines() == [
        "TensorBoard cannot be written (OSError: [Errno 27] File too large); going on without"
    ]


def test_no_metrics_yet(tmp_path):
    assert logs.read_metrics(tmp_path) == []


def test_progress_off_a_terminal_prints_a_line_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock[0])
    with logs.progress(100, 10, "training") as bar:
        for _ in range(70):
            clock[0] += 1.0
            bar.update(1, loss=jnp.float32(2.5))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training 40/100, loss 2.5, 1/s, 01:00 left",
        "training 70/100, loss 2.5, 1/s, 00:30 left",
    ]


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(logs.sys.stderr, "isatty", lambda: True, raising=False)
    with logs.progress(4, 1, "training") as bar:
        bar.update(3, loss=jnp.float32(2.5000001))
    err = capsys.readouterr().err
    assert "training" in err and "4/4" in err and "loss=2.5]" in err
