"""Images, packed records and their errors in a bucket."""

import io
from concurrent import futures

import numpy as np
import pytest
from etils import epath
from PIL import Image
from server import LOST, RESET

from var_jax.data.sources import SPLITS, EncodedImages, ImageSource, open_encoded, open_source
from var_jax.data.sources.packed import pack
from var_jax.tools import buckets


def store_images(server, count=12):
    """Two classes of small images in gs://bucket/pets."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
        server.store("bucket", f"pets/{('cat', 'dog')[i % 2]}/{i}.png", file.getvalue())


def test_images_are_read_from_a_bucket_that_fails_once_for_each_kind(server):
    store_images(server)
    source = open_source("gs://bucket/pets", "train", 16)
    server.log.clear()
    wanted = [source[i]["image"] for i in range(len(source))]
    assert len(server.log) == len(source)
    faults = [503, 429, RESET, LOST]
    server.fault = lambda method, path: faults.pop() if faults and "alt=media" in path else None
    with futures.ThreadPoolExecutor(8) as pool:  # each waits for over a second
        found = list(pool.map(source.__getitem__, range(len(source))))
    for item, image in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(item["image"], image)
    assert not faults and not source.skipped


def test_an_image_that_is_gone_is_skipped_by_name(server, capsys):
    store_images(server)
    source = open_source("gs://bucket/pets", "train", 16)
    gone = source.encoded.load(0)[2]
    del server.buckets["bucket"][gone.removeprefix("gs://bucket/")]
    assert source[0]["image"].shape == (16, 16, 3)
    (name,) = source.skipped
    assert gone.split("/")[-1] in name and "there is none" in capsys.readouterr().err


def test_an_outage_longer_than_the_library_waits_ends_no_run(monkeypatch):
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    errors = [TimeoutError(), ConnectionResetError(104, "reset"), OSError("Retries are used up")]

    def read(index):
        if errors:
            raise errors.pop()
        return file.getvalue(), 0, "a"

    source = ImageSource(EncodedImages(1, read, ("a",)), 16, 1.0)
    assert source[0]["image"].shape == (16, 16, 3) and not source.skipped


def test_images_are_packed_into_a_bucket_and_read_there(server):
    store_images(server)
    splits = {split: open_encoded("gs://bucket/pets", split) for split in SPLITS}
    left = [429]
    server.fault = lambda method, path: left.pop() if left and method == "POST" else None
    pack(splits, epath.Path("gs://bucket/packed"))
    assert not left
    packed = open_encoded("gs://bucket/packed", "train")
    left.append(RESET)
    server.fault = lambda method, path: left.pop() if left and "array_record?" in path else None
    for i in range(len(packed)):
        data, label, _ = packed.load(i)
        assert (data, label) == splits["train"].load(i)[:2]
    assert not left and not [key for key in server.buckets["bucket"] if "partial" in key]


def test_an_answer_of_the_bucket_is_no_damage_of_a_file(server, monkeypatch):
    monkeypatch.setattr(buckets.time, "sleep", lambda seconds: None)
    store_images(server)
    splits = {split: open_encoded("gs://bucket/pets", split) for split in SPLITS}
    pack(splits, epath.Path("gs://bucket/packed"))
    packed = open_encoded("gs://bucket/packed", "train")
    server.fault = lambda method, path: 403 if "array_record" in path else None
    with pytest.raises(OSError, match=r"array_record cannot be read: .*403"):
        packed.load(0)
    server.fault = lambda method, path: None
    assert packed.load(0)[0] == splits["train"].load(0)[0]
