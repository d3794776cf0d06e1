"""Hostile or careless files and flags: a sentence, exit code 2, nothing written, nothing run."""

import gzip
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib

import numpy as np
import pytest
from running import TINY, complaint

MARK = pathlib.Path(tempfile.gettempdir()) / f"executed-{os.getpid()}"
MOST_MEMORY = 2**29  # bytes that a refusal may take; the bombs claim far more


class Attack:
    """Pickled, it is a call of os.system; unpickled by `pickle`, the call is made."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A PNG that claims a size; its pixels are few."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    data = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def npy(shape, dtype="|u1"):
    """The header of an array."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(118 - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def zipped(**files):
    """A zip of named bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_npy", ".npy"), data)
    return out.getvalue()


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def bomb(megabytes):
    """So many megabytes of zeros behind an array's header, as a zip of a thousandth."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy((megabytes * 2**20 // 192, 8, 8, 3)))
        for _ in range(megabytes):
            file.write(bytes(2**20))
    return out.getvalue()


def torch_file(pickled, storage=None):
    """A .pth as torch.save writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        if storage is not None:
            archive.writestr("archive/data/0", storage)
    return out.getvalue()


def claims(count):
    """The pickle of a state dict whose one float32 tensor has so many numbers."""
    return (
        b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02(("
        b"X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05"
        b"X\x03\x00\x00\x00cpuq\x06\x8a\x08" + struct.pack("<q", count) + b"tQK\x00\x8a\x08"
        + struct.pack("<q", count) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def safetensors(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tar(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
    return out.getvalue()


IMAGES = np.zeros((4, 16, 16, 3), np.uint8)
GOOD = {"arr_0": IMAGES, "labels": np.zeros(4, int)}
TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# What a file holds, by its name.
FILES = {
    "bomb.png": png(100_000, 100_000),
    "cut.png": png(16, 16),
    "page.png": b"<!doctype html><html><body>not found</body></html>",
    "empty.png": b"",
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "text.npz": b"hello",
    "empty.npz": b"",
    "cut.npz": npz(**GOOD)[:-60],
    "pickled.npz": zipped(arr_0_npy=npy((1,), "|O") + pickle.dumps(Attack())),
    "pickled_labels.npz": npz(arr_0=IMAGES, labels=np.array([Attack()] * 4, object)),
    "bomb.npz": bomb(1200),
    "claims.npz": zipped(arr_0_npy=npy((10**12, 16, 16, 3)) + bytes(100)),
    "floats.npz": npz(arr_0=IMAGES.astype(np.float32), labels=np.zeros(4, int)),
    "grey.npz": npz(arr_0=IMAGES[..., 0], labels=np.zeros(4, int)),
    "no_images.npz": npz(arr_0=IMAGES[:0], labels=np.zeros(0, int)),
    "no_labels.npz": npz(arr_0=IMAGES),
    "negative.npz": npz(arr_0=IMAGES, labels=np.array([0, 1, -1, 0])),
    "huge_label.npz": npz(arr_0=IMAGES, labels=np.array([0, 1, 2**40, 0])),
    "float_labels.npz": npz(arr_0=IMAGES, labels=np.array([0.0, 1, np.nan, 0])),
    "same_names.npz": npz(**GOOD, class_names=np.array(["a", "a"])),
    "attack.pth": torch_file(pickle.dumps({"weight": Attack()})),
    "bare_attack.pth": pickle.dumps(Attack()),
    "terabyte.pth": torch_file(claims(2**38), bytes(8)),
    "negative.pth": torch_file(claims(-5), bytes(8)),
    "no_storage.pth": torch_file(claims(2)),
    "no_weights.pth": torch_file(pickle.dumps({})),
    "list.pth": torch_file(pickle.dumps([1, 2])),
    "cut.pth": torch_file(pickle.dumps({}))[:-20],
    "text.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    "long_header.safetensors": safetensors({}, size=2**60),
    "text_header.safetensors": safetensors(b"hello there"),
    "overlap.safetensors": safetensors({"a": TENSOR, "b": TENSOR}, bytes(8)),
    "beyond.safetensors": safetensors({"a": TENSOR | {"data_offsets": [0, 2**50]}}, bytes(8)),
    "kind.safetensors": safetensors({"a": TENSOR | {"dtype": "F99"}}, bytes(8)),
    "config_error.py": b"def get_config():\n    raise RuntimeError('no')\n",
    "config_syntax.py": b"def get_config(:\n",
    "config_list.py": b"def get_config():\n    return [1]\n",
    "config_none.py": b"x = 1\n",
}

# A folder: a function that fills it.
FOLDERS = {
    "no_files": lambda folder: None,
    "no_classes": lambda folder: (folder / "a.png").write_bytes(png(4, 4)),
    "no_pictures": lambda folder: _class(folder, "a", {"x.txt": b"x", "y.txt": b"y"}),
    "pages": lambda folder: _class(folder, "a", {f"{i}.jpg": b"<html>" for i in range(30)}),
    "escape_tars": lambda folder: (folder / "ILSVRC2012_img_train.tar").write_bytes(
        tar(("../../evil", tarfile.REGTYPE, ""), ("dev", tarfile.CHRTYPE, ""))
    ),
    "cut_tars": lambda folder: (folder / "ILSVRC2012_img_train.tar").write_bytes(b"x" * 700),
    "manifest_text": lambda folder: (folder / "manifest.json").write_text("hello"),
    "manifest_list": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest_other": lambda folder: (folder / "manifest.json").write_text('{"kind": "x"}'),
    "idx_claims": lambda folder: [
        (folder / f"train-{kind}-idx{n}-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBB", 0, 8, n) + n * b"\xff\xff\xff\xff")
        )
        for kind, n in (("images", 3), ("labels", 1))
    ],
}

# A pipe, which nobody writes to, as what would be read.
PIPES = ("manifest.json", "ILSVRC2012_img_train.tar", "train-labels-idx1-ubyte", "x.npz")
FOLDERS |= {f"pipe_{name}": lambda folder, name=name: os.mkfifo(folder / name) for name in PIPES}

# A checkpoint: how a good one is spoiled.
CHECKPOINTS = {
    "config_text": lambda folder: (folder / "config.json").write_text("hello"),
    "config_list": lambda folder: (folder / "config.json").write_text("[]"),
    "config_nothing": lambda folder: (folder / "config.json").write_text("{}"),
    "config_deep": lambda folder: (folder / "config.json").write_text("[" * 200_000),
    "config_huge": lambda folder: _edit(folder, "transformer", "depth", 10**9),
    "config_negative": lambda folder: _edit(folder, "transformer", "width", -32),
    "config_type": lambda folder: _edit(folder, "tokenizer", "patch_nums", {"a": 1}),
    "no_weights": lambda folder: shutil.rmtree(folder / "weights"),
    "empty_weights": lambda folder: [p.unlink() for p in _files(folder / "weights")],
    "config_pipe": lambda folder: _pipe(folder / "config.json"),
    "weights_pipe": lambda folder: _pipe(max(_files(folder / "weights"))),
    "record_pipe": lambda folder: _pipe(folder / "weights" / "files.json"),
    "bit": lambda folder: _flip(max(_files(folder / "weights"), key=lambda p: p.stat().st_size)),
}

DATA = {
    "bomb.npz", "claims.npz", "cut.npz", "empty.npz", "float_labels.npz", "floats.npz", "grey.npz",
    "huge_label.npz", "negative.npz", "no_images.npz", "no_labels.npz", "pickled.npz",
    "pickled_labels.npz", "same_names.npz", "text.npz",
}  # fmt: skip
TRAIN = ("--config", TINY)
CASES = [
    *(("train", *TRAIN, f"--config.data.source=FILES/{name}") for name in sorted(DATA)),
    *(("train", *TRAIN, f"--config.data.source=FOLDERS/{name}") for name in FOLDERS),
    ("train", *TRAIN, "--config.data.source=idx:FOLDERS/idx_claims"),
    ("train", *TRAIN, "--config.data.source=tfds:../../etc"),
    ("train", *TRAIN, "--config.data.source=s3://bucket/images"),
    ("train", *TRAIN, "--config.data.source="),
    *(("train", "--config", f"FILES/{name}") for name in FILES if name.startswith("config_")),
    ("train", *TRAIN, "--config.init_from=FILES/text.pth"),
    ("train", *TRAIN, "--config.report=os:system"),
    ("train", *TRAIN, "--config.report=nowhere:nothing"),
    ("train", *TRAIN, "--config.train_transformer.lr_scale=(((=0"),
    ("train", *TRAIN, "--config.tokenizer.patch_nums=(1,1000000)"),
    ("train", *TRAIN, "--config.train_tokenizer.steps=1e400"),
    ("train", *TRAIN, "--config.train_tokenizer.batch_size=999999999"),
    ("train", *TRAIN, "--config.transformer.depth=1000000000"),
    ("train", *TRAIN, "--config.transformer.mlp_ratio=1e9"),
    ("train", *TRAIN, "--config.transformer.num_classes=1000000000000"),
    ("train", *TRAIN, "--config.tokenizer.channel_mults=(1,1000000000)"),
    ("train", *TRAIN, f"--config.tokenizer.patch_nums=({'1,' * 100})"),
    ("train", *TRAIN, "--config.data.source=FOLDERS/pipe_x.npz/x.npz"),
    ("train", *TRAIN, "--config.data.source=GS:///x"),
    ("encode", "--checkpoint", "GOOD", "--images", f"{'a/' * 1500}x.npz"),
    *(("encode", "--checkpoint", "GOOD", "--images", f"FILES/{name}") for name in sorted(
        DATA - {"float_labels.npz", "huge_label.npz", "negative.npz", "no_labels.npz",
                "pickled_labels.npz", "same_names.npz"}
    )),
    *(("edit", "--checkpoint", "GOOD", "--task", "inpaint", "--box", "0,0,.5,1", "--image",
       f"FILES/{name}") for name in FILES if name.endswith((".png", ".svg"))),
    *(("sample", "--checkpoint", f"CHECKPOINTS/{name}", "--num", "1") for name in CHECKPOINTS),
    *(("convert", "--transformer", f"FILES/{name}") for name in FILES
      if name.endswith((".pth", ".safetensors"))),
    ("sample", "--checkpoint", "GOOD", "--labels", "Flags:99999999999999999999"),
    ("sample", "--checkpoint", "GOOD", "--num", "10000000000000000"),
    ("sample", "--checkpoint", "GOOD", "--labels", "0:100000000,1:100000000"),
    ("sample", "--checkpoint", "GOOD", "--num", "100000000", "--reject", ".0001"),
    ("edit", "--checkpoint", "GOOD", "--image", "x.png", "--box", "0,0,1,1", "--num", "9999999999"),
    ("encode", "--checkpoint", "GOOD", "--images", "emoji", "--copies", "99999999999"),
    ("train", "--config", "finetune:"),
    ("sample", "--checkpoint", "GOOD", "--num", "4", "--scorer", "os:system", "--reject", ".5"),
    ("edit", "--checkpoint", "GOOD", "--task", "inpaint", "--image", "FOLDERS", "--box", "0,0,1,1"),
]  # fmt: skip


def _class(folder, name, files):
    for split in ("train", "val"):
        (folder / split / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / split / name / file).write_bytes(data)


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def _edit(folder, part, name, value):
    config = json.loads((folder / "config.json").read_text())
    config[part][name] = value
    del config["checksums"]  # so that the value itself is seen
    (folder / "config.json").write_text(json.dumps(config))


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.fixture(scope="module")
def places(tmp_path_factory, untrained):
    """Where the files, folders and checkpoints of the tables lie."""
    root = tmp_path_factory.mktemp("hostile")
    for group in ("FILES", "FOLDERS", "CHECKPOINTS"):
        (root / group).mkdir()
    for name, data in FILES.items():
        (root / "FILES" / name).write_bytes(data)
    for name, fill in FOLDERS.items():
        (root / "FOLDERS" / name).mkdir()
        fill(root / "FOLDERS" / name)
    for name, spoil in CHECKPOINTS.items():
        spoil(pathlib.Path(shutil.copytree(untrained, root / "CHECKPOINTS" / name)))
    shutil.copytree(untrained, root / "GOOD")
    return root


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint/.DS_Store", "checkpoint/grid.png"])
def test_what_the_export_would_delete_is_refused_at_the_start(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    said = complaint("train", *TRAIN, "--workdir", tmp_path)
    assert f"{tmp_path / 'checkpoint'} " in said and "expected a" in said
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case[:1] + case[-2:])))
def test_a_sentence_and_nothing_else(places, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    command, *words = (str(word) for word in case)
    for place in ("FILES", "FOLDERS", "CHECKPOINTS", "GOOD"):
        words = [word.replace(place, str(places / place)) for word in words]
    out = "--workdir" if command == "train" else "--out"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = complaint(command, *words, out, tmp_path / "out")
    assert said.startswith("error: ") and "Traceback" not in said and len(said) < 600
    assert not list(tmp_path.iterdir()), "something was written"
    assert not MARK.exists(), "something in a file was run"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY / 1024
