"""IDX files: MNIST and the sets that are made like it."""

import gzip
import os
import struct

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.data.sources import open_source
from var_jax.data.sources.tfds import prepare_idx

FASHION = np.array([9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 1, 4, 6, 8], np.uint8)


def idx(array, kind=8):
    """An array as the bytes of an IDX file."""
    header = struct.pack(">HBB", 0, kind, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def zipped(content):
    """Without the time, so that all test processes see the same names of tests."""
    return gzip.compress(content, mtime=0)


def images(count, height=28, width=28):
    return np.arange(count * height * width).reshape(count, height, width).astype(np.uint8)


def write(folder, labels=FASHION, packed=True, prefix="", test="t10k"):
    """A small set; its images are numbered through."""
    for split, count in (("train", len(labels)), (test, 5)):
        for kind, array in (("images", images(count)), ("labels", labels[:count])):
            path = folder / f"{prefix}{split}-{kind}-idx{array.ndim}-ubyte{'.gz' * packed}"
            path.write_bytes(zipped(idx(array)) if packed else idx(array))
    return f"idx:{folder}"


@pytest.mark.parametrize("packed", [True, False])
def test_images_get_a_border_and_classes_their_names(tmp_path, packed):
    spec = write(tmp_path, packed=packed)
    train, validation = (open_source(spec, split, 32) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (14, 5)
    item = train[3]
    assert train.class_names[item["label"]] == "Dress" and item["label"].dtype == np.int32
    assert np.array_equal(item["image"][2:-2, 2:-2, 1], images(14)[3])
    assert not item["image"][:2].any() and not item["image"][:, -2:].any()
    assert open_source(spec, "train", 16).train_item(0, 0, np.random.default_rng(0))[
        "image"
    ].shape == (16, 16, 3)


def test_letters_are_turned_and_count_from_one(tmp_path):
    labels = np.array([2, 1, 3, 1, 2], np.uint8)
    spec = write(tmp_path, labels, prefix="emnist-letters-", test="test")
    source = open_source(spec, "validation", 32)
    assert source.class_names == ("A", "B", "C") and source[0]["label"] == 1
    assert np.array_equal(source[0]["image"][2:-2, 2:-2, 0], images(5)[0].T)


@pytest.mark.parametrize("folder, prefix", [("KMNIST/raw", ""), ("sets", "kmnist-")])
def test_syllables_of_kmnist(tmp_path, folder, prefix):
    (tmp_path / folder).mkdir(parents=True)
    spec = write(tmp_path / folder, np.arange(10).astype(np.uint8), prefix=prefix)
    names = open_source(spec, "train", 32).class_names
    assert names == ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    (tmp_path / folder / "fashion").mkdir()
    theirs = open_source(write(tmp_path / folder / "fashion"), "train", 32).class_names
    assert theirs[:2] == ("T-shirt/top", "Trouser")


def test_a_set_of_tfds_without_tensorflow(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "idx").mkdir()
    spec, root = write(tmp_path / "idx"), tmp_path / "sets"
    prepare_idx("fashion_mnist", str(tmp_path / "idx"), str(root))
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    for split, count in (("train", 14), ("validation", 5)):
        source, theirs = (
            open_source(name, split, 28, 1.0) for name in ("tfds:fashion_mnist", spec)
        )
        assert len(source) == count and source.class_names == theirs.class_names
        items = [source[i] for i in range(count)]
        assert {int(item["label"]) for item in items} == {*map(int, FASHION[:count])}
        found = sorted(item["image"][..., 0].tobytes() for item in items)
        assert found == sorted(image.tobytes() for image in images(count))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train-labels-idx1-ubyte", None, "has no train labels"),
        ("train-labels-idx1-ubyte", b"hello there", "is not an IDX file of bytes"),
        ("train-labels-idx1-ubyte", idx(FASHION, kind=13), "is not an IDX file of bytes"),
        ("train-labels-idx1-ubyte", b"\0", "cannot be read"),
        ("train-labels-idx1-ubyte", idx(FASHION)[:-1], "its header says"),
        ("train-labels-idx1-ubyte", idx(FASHION) + b"x", "its header says"),
        ("train-labels-idx1-ubyte", idx(FASHION[1:]), "labels of"),
        ("train-labels-idx1-ubyte.gz", zipped(idx(FASHION))[:-9], "cannot be read"),
        ("train-images-idx3-ubyte", b"\0\0\x08\3" + 12 * b"\xff", "expected at most"),
        ("t10k-labels-idx1-ubyte", idx(np.full(5, 11, np.uint8)), "validation has label 11"),
        ("kmnist-train-labels-idx1-ubyte", idx(FASHION), "holds several sets"),
        ("train-labels-idx1-ubyte", idx(images(14)), r"\(14, 28, 28\); expected labels"),
        ("train-images-idx3-ubyte", idx(images(14, width=0)), r"\(14, 28, 0\)"),
        ("+t10k-labels-idx1-ubyte.gz", zipped(idx(images(5)[:, 0, 0] + 1)), "which differ"),
    ],
)
def test_bad_files_are_told(tmp_path, name, content, message):
    spec = write(tmp_path, packed=False)
    if not name.startswith("+"):  # beside the good one
        (tmp_path / name.removesuffix(".gz")).unlink(missing_ok=True)
    if name.startswith("kmnist"):
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(FASHION))
    if content is not None:
        (tmp_path / name.removeprefix("+")).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        for split in ("train", "validation"):
            open_source(spec, split, 32)


@pytest.mark.parametrize(("kind", "name"), [("byclass", "c"), ("balanced", "d"), ("digits", "38")])
def test_characters_of_emnist(tmp_path, kind, name):
    labels = np.array([0, 10, 38, 9], np.uint8)
    source = open_source(write(tmp_path, labels, prefix=f"emnist-{kind}-"), "train", 32)
    named = ("0", "9", "A", name) if kind != "digits" else ("0", "9", "10", "38")
    assert source.class_names == named and source.class_names[source[2]["label"]] == name


def test_other_labels_than_fashions_are_numbers(tmp_path):
    source = open_source(write(tmp_path, np.append(FASHION, np.uint8(12))), "train", 32)
    assert source.class_names == (*map(str, range(10)), "12")


def test_a_pipe_is_no_file(tmp_path):
    spec = write(tmp_path, packed=False)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    os.mkfifo(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(BadInput, match="has no train labels"):
        open_source(spec, "train", 32)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="has no train labels"):
        open_source(f"idx:{tmp_path / 'none'}", "train", 32)
