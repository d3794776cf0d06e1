"""Hostile and damaged data: a sentence, bounded memory, no waiting."""

import gzip
import io
import json
import os
import resource
import socket
import struct
import tarfile
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image
from test_sources import COLOURS, add, jpeg, write_tree

from var_jax import BadInput
from var_jax.data.decoding import Unreadable, decode
from var_jax.data.records import MANIFEST, Records, write_shard
from var_jax.data.sources import open_encoded, open_source
from var_jax.data.sources.packed import pack
from var_jax.data.sources.tars import TARS
from var_jax.data.token_cache import TokenCache

MOST_MEMORY = 2**29


@pytest.fixture(autouse=True)
def bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY / 1024


def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, more=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + chunk(b"IEND", b"")


def resized(kind, old, new, **options):
    """An image of 300 x 200 pixels whose header says another size."""
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, kind, **options)
    assert old in file.getvalue()
    return file.getvalue().replace(old, new, 1)


HUGE = {
    "png": png(100_000, 100_000),
    "png of no width": png(0, 5),
    "jpeg": resized("JPEG", struct.pack(">HH", 200, 300), struct.pack(">HH", 65_000, 65_000)),
    "gif": resized("GIF", struct.pack("<HH", 300, 200), struct.pack("<HH", 65_000, 65_000)),
    "bmp": resized("BMP", struct.pack("<ii", 300, 200), struct.pack("<ii", 2**30, 2**30)),
    "ppm": b"P6 99999 99999 255\n" + bytes(100),
    "tiff": resized("TIFF", struct.pack("<HHII", 256, 4, 1, 300)[:-4] + struct.pack("<I", 300),
                    struct.pack("<HHII", 256, 4, 1, 2**30)),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": b"<!doctype html><title>404</title>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "nothing": b"",
    "only a start": b"\xff\xd8\xff",
    "only chunks": b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt" * 9,
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
def test_images(kind):
    with pytest.raises(Unreadable):
        decode(HUGE[kind], 20)


def test_a_text_chunk_that_unpacks_to_gigabytes():
    packer = zlib.compressobj()
    first, other = (
        packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    bomb = first + 4000 * other
    assert decode(png(100, 100, chunk(b"zTXt", b"a\0\0" + bomb)), 20).size == (100, 100)


def only(make):
    """A class whose only image is made so."""

    def fill(folder):
        (folder / "cat").mkdir()
        make(folder / "cat" / "a.png")

    return fill


def bind(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def tars(train):
    return lambda folder: (folder / TARS["train"]).write_bytes(train(folder))


def tar_of(*names, mode="w", kind=tarfile.REGTYPE, size=None):
    """The bytes of a tar with an inner tar that has members of these names."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode=mode) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with tarfile.open(fileobj=outer, mode="w") as tar:
        add(tar, "n00000001.tar", inner.getvalue())
    data = bytearray(outer.getvalue())
    if size is not None:
        at = 512 + 124  # of the inner header
        data[at : at + 12] = size.to_bytes(12, "big", signed=True)
        header = bytes(data[512:660]) + b" " * 8 + bytes(data[668:1024])
        data[660:668] = b"%06o\0 " % sum(header)
    return bytes(data)


def packed(change):
    def fill(folder):
        tree = write_tree(folder / "tree", {"train": 2, "val": 1})
        splits = {split: open_encoded(str(tree), split) for split in ("train", "validation")}
        pack(splits, epath.Path(folder / "packed"))
        change(folder / "packed")
        return folder / "packed"

    return fill


def manifest(**fields):
    def change(folder):
        found = json.loads((folder / MANIFEST).read_text()) | fields
        (folder / MANIFEST).write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}))

    return packed(change)


def first_record(data):
    def change(folder):
        path = next(epath.Path(folder).glob("train-*"))
        path.unlink()
        write_shard(path, [data] + 5 * [b"0 x\n" + jpeg((1, 2, 3), 0)])

    return packed(change)


def shard(change):
    def spoil(folder):
        path = next(folder.glob("train-*"))
        path.write_bytes(change(path.read_bytes()))

    return packed(spoil)


FOLDERS = {
    "pipe": (only(os.mkfifo), "cat holds no images"),
    "socket": (only(bind), "cat holds no images"),
    "link to itself": (only(lambda path: path.symlink_to(path)), "cat holds no images"),
    "link to nowhere": (only(lambda path: path.symlink_to("nowhere")), "cat holds no images"),
    "folder called a.png": (only(lambda path: path.mkdir()), "cat holds no images"),
    "empty image": (only(lambda path: path.touch()), "cat holds no images"),
    "svg": (only(lambda path: path.write_bytes(HUGE["svg"])), "cat holds no images"),
    "class that is a loop": (lambda f: (f / "cat").symlink_to(f / "cat"), "holds no images"),
    "loop of folders": (only(lambda path: path.symlink_to("..")), "cat holds no images"),
    "tar that is empty": (tars(lambda f: b""), "is damaged, or no plain tar"),
    "tar of noise": (tars(lambda f: bytes(range(1, 256)) * 9), "is damaged, or no plain tar"),
    "tar cut in half": (tars(lambda f: tar_of(*"abcdefgh")[:3000]), "img_train.tar is damaged"),
    "tar in gzip": (tars(lambda f: gzip.compress(tar_of("a"))), "is damaged, or no plain tar"),
    "inner tar in gzip": (tars(lambda f: tar_of("a", mode="w:gz")), "is damaged, or no plain tar"),
    "tar of links": (tars(lambda f: tar_of("../../a", kind=tarfile.SYMTYPE)), "holds no images"),
    "tar of devices": (tars(lambda f: tar_of("/dev/a", kind=tarfile.CHRTYPE)), "holds no images"),
    "tar of no text": (tars(lambda f: tar_of(os.fsdecode(b"\xff"))), "a class is called .*udcff"),
    "negative size": (tars(lambda f: tar_of("a", size=-1024)), "is damaged|holds no images"),
    "manifest without counts": (manifest(counts="gone"), "is damaged .KeyError"),
    "counts of text": (manifest(counts={"train": "many"}), "is damaged .ValueError"),
    "counts in a list": (manifest(counts=[1]), "is damaged .TypeError"),
    "negative counts": (manifest(counts={"train": -5}), "is damaged .ValueError: -5 images"),
    "counts beyond reason": (manifest(counts={"train": 10**15}), "is missing|is damaged"),
    "shards of nothing": (manifest(shard_size=0), "is damaged .ZeroDivision"),
    "no classes": (manifest(class_names=None), "is damaged .TypeError"),
    "fewer classes": (manifest(class_names=["a"]), r"has label b'1'; expected 0 to 0"),
    "a record of another label": (first_record(b"7 x\nx"), r"record 0 .* has label b'7'"),
    "a negative label": (first_record(b"-1 x\nx"), r"record 0 of train has label b'-1'"),
    "a label of noise": (first_record(b"\xff\xfe"), r"record 0 of train has label"),
    "an empty record": (first_record(b""), r"record 0 of train has label b''"),
    "a shard cut in half": (shard(lambda data: data[: len(data) // 2]), "is damaged|label b''"),
    "an empty shard": (shard(lambda data: b""), "is damaged"),
    "a shard of noise": (shard(lambda data: bytes(range(256)) * 400), "is damaged"),
    "a shard with a flipped bit": (
        shard(lambda data: data[:1_000] + bytes([data[1_000] ^ 8]) + data[1_001:]), "is damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    fill, sentence = FOLDERS[kind]
    folder = fill(tmp_path)
    folder = folder if isinstance(folder, type(tmp_path)) and folder.is_dir() else tmp_path
    with pytest.raises(BadInput, match=sentence) as refused:
        source = open_source(str(folder), "train", 16)
        for index in range(min(len(source), 6)):
            source[index]
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_of_a_terabyte_is_not_read(tmp_path):
    tree = write_tree(tmp_path, {"train": 2, "val": 1})
    with (tree / "train" / next(iter(COLOURS)) / "huge.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(2**40)
    source = open_source(str(tree), "train", 16)
    assert len(source) == 7 and [source[i]["label"] for i in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert next(iter(source.skipped)).endswith("huge.jpg")


def test_more_shards_than_files_may_be_open(tmp_path):
    records = Records(str(tmp_path), "train", 150, 1)
    for i in range(150):
        write_shard(records.path(i), [b"%d" % i])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert [int(records[i]) for i in range(150)] == [*range(150)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("record", [b"", b"\0", b"\0" * 10, b"\0" * 14])
def test_token_records_of_another_length(tmp_path, record):
    records = Records(str(tmp_path), "train", 1, 1)
    write_shard(records.path(0), [record])
    with pytest.raises(BadInput, match=f"a record has {len(record)} bytes; encode it again"):
        TokenCache(records, 1, ("a",), 5)[0]


def test_labels_of_bytes_and_numbers_are_text(tmp_path):
    arrays = {
        "arr_0": np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8),
        "labels": np.arange(40) % 2,
    }
    path = tmp_path / "set.npz"
    for names, wanted in (
        (np.array([b"cat", b"dog"]), ("cat", "dog")),
        (np.array(["cat", "Z\u00fcrich"]), ("cat", "Z\u00fcrich")),
        (np.array([7, 12]), ("7", "12")),
    ):
        np.savez(path, class_names=names, **arrays)
        assert open_source(str(path), "train", 4).class_names == wanted
    for names, sentence in (
        (np.array([0.5, np.nan]), "class_names is float64"),
        (np.array(["cat", " "]), "a class is called ' '; expected"),
        (np.array([b"cat", b"cat"]), "2 classes are called 'cat'"),
        (np.array([["a", "b"]]), r"class_names is <U1 of shape \(1, 2\)"),
        (np.array(["a", None], object), "holds an array of objects, and objects could run code"),
    ):
        np.savez(path, class_names=names, **arrays)
        with pytest.raises(BadInput, match=sentence):
            open_source(str(path), "train", 4)
