"""The error for a bucket that does not exist, or that the user may not access."""

import re
import sys
from pathlib import Path

import fsspec
import pytest

sys.path.append(str(Path(__file__).parents[1] / "commands"))
from running import TINY, complaint
from test_data import store_images

from var_jax.tools import buckets

COMMANDS = [
    ["train", "--config", TINY, "--workdir", "{}/run"],
    ["train", "--config", TINY, "--config.data.source={}/pets", "--workdir", "run"],
    ["train", "--config", TINY, "--config.pretrained_tokenizer", "{}/c", "--workdir", "run"],
    ["sample", "--checkpoint", "{}/c", "--num", "1"],
    ["sample", "--checkpoint", "emoji", "--num", "1", "--out={}"],
    ["encode", "--checkpoint", "emoji", "--images", "{}/pets", "--out", "tokens"],
    ["encode", "--checkpoint", "emoji", "--images", "emoji", "--out", "{}/tokens"],
    ["prepare", "--source", "{}/pets", "--out", "packed"],
    ["convert", "--checkpoint", "{}/c", "--to_torch", "torch"],
]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty folder to be in, and no bucket known to be fine."""
    monkeypatch.chdir(tmp_path)
    buckets.check_bucket.cache_clear()
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", COMMANDS, ids=lambda flags: flags[0])
def test_a_bucket_that_is_not_there_is_named(server, flags):
    err = complaint(*(str(flag).format("gs://nobucket") for flag in flags))
    assert err == "error: gs://nobucket: there is no such bucket.\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["convert", "--checkpoint", "emoji", "--to_torch", "gs://bucket/torch"],
        ["prepare", "--source", "gs://bucket/tars", "--out", "packed"],
    ],
)
def test_what_needs_a_disk_is_refused_in_a_bucket(server, flags):
    server.store("bucket", "tars/ILSVRC2012_img_train.tar", b"tar")
    err = complaint(*flags)
    assert re.search(
        r"gs://bucket/\S+ is in a bucket; files of this kind must be on a local disk", err
    ), err
    assert [*server.buckets["bucket"]] == ["tars/ILSVRC2012_img_train.tar"]


@pytest.mark.parametrize(
    "flags",
    [
        ["convert", "--tokenizer={}", "--out=new"],
        ["evaluate", "--checkpoint=emoji", "--tokenizer", "--source=emoji", "--features={}"],
    ],
    ids=lambda flags: flags[0],
)
def test_weights_that_are_not_in_the_bucket_are_named(server, flags):
    err = complaint(*(flag.format("gs://bucket/w.pth") for flag in flags))
    assert "error: gs://bucket/w.pth: there is no such object" in err


@pytest.mark.parametrize(("fault", "says"), [(401, "no valid credentials"), (403, "no permission")])
def test_a_bucket_that_may_not_be_read_is_named(server, fault, says):
    server.fault = lambda method, path: fault
    err = complaint("train", "--config", TINY, "--workdir", "gs://bucket/run")
    assert err.startswith("error: gs://bucket cannot be read") and says in err


def test_a_bucket_that_may_not_be_written_is_named(server):
    store_images(server)
    server.fault = lambda method, path: None if method == "GET" else 403
    err = complaint("prepare", "--source", "gs://bucket/pets", "--out", "gs://bucket/packed")
    assert "gs://bucket/packed cannot be written: these credentials have no permission" in err


@pytest.mark.parametrize("name", ["lr[1e-3]", "run*", "a?b", "a#1"])
def test_a_name_that_is_a_pattern_in_buckets_is_refused(server, name):
    err = complaint("train", "--config", TINY, "--workdir", f"gs://bucket/{name}")
    assert f"gs://bucket/{name} holds" in err and not server.log


def test_the_package_that_is_missing_is_named(monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    err = complaint("sample", "--checkpoint", "gs://bucket/c", "--num", "1")
    assert "pip install 'var_jax[gcs]'" in err
