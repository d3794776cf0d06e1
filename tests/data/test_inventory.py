"""The record of a run's images: adding or removing one moves no other, and changes are reported."""

import json
import os

import numpy as np
import pytest
from etils import epath
from PIL import Image

from var_jax import BadInput
from var_jax.data.inventory import remember, summarize
from var_jax.data.sources import Emoji, folders, open_encoded, open_source
from var_jax.data.sources.base import split_indices
from var_jax.data.sources.packed import pack


def write_images(folder, numbers):
    """Images of one pixel, each of its own colour; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        Image.new("RGB", (1, 1), (i % 256, i // 256, len(folder.name))).save(
            folder / f"{i:04d}.png"
        )
    return folder


def splits(spec, size=8):
    return {split: open_source(str(spec), split, size) for split in ("train", "validation")}


def names(spec, split):
    return set(open_encoded(str(spec), split).names)


def test_an_image_more_or_less_moves_no_other(tmp_path):
    for name in ("cat", "dog", "emu"):
        write_images(tmp_path / name, range(40))
    before = {split: names(tmp_path, split) for split in ("train", "validation")}
    assert 5 < len(before["validation"]) < 25
    write_images(tmp_path / "cat", [4000])
    (tmp_path / "dog" / "0007.png").unlink()
    for split in before:
        moved = names(tmp_path, split) ^ before[split]
        assert moved <= {"cat/4000.png", "dog/0007.png"}


def test_images_of_an_npz_stay_in_their_split_in_any_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), np.uint8)

    def held_out(chosen):
        path = tmp_path / "set.npz"
        np.savez(path, arr_0=images[chosen], labels=np.arange(60)[chosen] % 2)
        return {image.tobytes() for image in open_source(str(path), "validation", 4).images}

    everything, most = np.arange(60), np.arange(59)[::-1]
    assert held_out(everything) - {images[59].tobytes()} == held_out(most)


def test_the_share_held_out_is_a_tenth_and_small_sets_have_both_splits():
    labels = np.arange(20_000) % 10
    keys = [f"class/{i}.jpg".encode() for i in range(len(labels))]
    held_out = split_indices([*"abcdefghij"], keys, labels, "validation")
    assert abs(len(held_out) / len(labels) - 0.1) < 0.007
    for start in range(200):
        small, of = keys[start : start + 4], np.array([0, 0, 1, 1])
        parts = [split_indices("ab", small, of, split) for split in ("train", "validation")]
        assert {*of[parts[0]].tolist()} == {0, 1} and len(parts[1])
        assert sorted(np.concatenate(parts)) == [0, 1, 2, 3]


def test_images_are_found_by_content_and_the_rest_is_counted(tmp_path):
    cat, dog = (write_images(tmp_path / name, range(12)) for name in ("cat", "dog"))
    (cat / "0000.png").rename(cat / "no suffix")
    (cat / "0001.png").rename(cat / "image.jpg_large")
    (dog / "page.jpg").write_text("<html>404</html>")
    (dog / "notes.txt").write_text("BMW and P6 are no images")
    (dog / "empty.png").touch()
    (dog / "deeper.png").mkdir()
    os.mkfifo(dog / "pipe.png")
    (dog / "loop.png").symlink_to(dog / "loop.png")
    (tmp_path / "list.csv").touch()
    for name in ("Thumbs.db", ".DS_Store", ".hidden.png"):
        (dog / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    found = splits(tmp_path)
    assert sum(map(len, found.values())) == 24 and found["train"].class_names == ("cat", "dog")
    line = summarize("pets", found)
    assert line.startswith(f"pets: {len(found['train'])} train and {len(found['validation'])} vali")
    for part in (
        "validation images of 2 classes; left out: ", "2 of no known format ('dog/notes.txt', ...)",
        "1 empty ('dog/empty.png')", "2 no files ('dog/loop.png', ...)",
        "1 folders ('dog/deeper.png')", "1 beside the folders of classes ('list.csv')",
    ):  # fmt: skip
        assert part in line
    assert "hidden" not in line and "Thumbs" not in line


def test_large_trees_are_read_by_name(tmp_path, monkeypatch):
    cat = write_images(tmp_path / "cat", range(12))
    (cat / "page.jpg").write_text("<html>404</html>")
    (cat / "0000.png").rename(cat / "no suffix")
    monkeypatch.setattr(folders, "OPENED", 5)
    found = splits(tmp_path)
    assert sum(map(len, found.values())) == 13 and "left out" not in summarize("pets", found)
    assert not found["train"].encoded.sizes


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("a.png", "holds images, but no folders"),
        ("sets/pets/train/cat/a.png", r"sets holds no images itself, .*, as \S*/sets/pets has"),
        ("cat/tabby/a.png", r"cat holds no images itself, the first lies at \S*tabby/a.png"),
        ("cat/.a.png", "cat holds no images; every folder beside it counts as a class"),
        ("a\nb/a.png", r"a class is called 'a\\nb'; expected a name that"),
        (os.fsdecode(b"a\xff/a.png"), r"a class is called 'a\\udcff'; expected a name that"),
    ],
)
def test_images_at_another_level(tmp_path, where, sentence):
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    for image in (path, path.with_name(path.name.replace("a.", "b."))):
        Image.new("RGB", (1, 1)).save(image, "PNG")
    with pytest.raises(BadInput, match=sentence):
        open_encoded(str(tmp_path), "train")


def test_file_names_of_any_bytes(tmp_path):
    cat = write_images(tmp_path / "in" / "cat", range(12))
    for i, name in enumerate((b"a\nb.png", b"a\xffb.png")):
        (cat / f"{i:04d}.png").rename(os.fsdecode(os.fsencode(cat) + b"/" + name))
    found = {split: open_encoded(str(tmp_path / "in"), split) for split in ("train", "validation")}
    pack(found, epath.Path(tmp_path / "out"))
    for split, images in found.items():
        packed = open_encoded(str(tmp_path / "out"), split)
        assert [packed.read(i)[:2] for i in range(len(packed))] == [
            images.read(i)[:2] for i in range(len(images))
        ]


def warnings(capsys, path, spec, begun=True):
    remember(path, splits(spec), begun=begun)
    return capsys.readouterr().err


def test_a_later_start_tells_what_changed(tmp_path, capsys):
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, range(100))
    path = epath.Path(tmp_path / "run" / "data.json")
    assert warnings(capsys, path, tmp_path / "pets", begun=False) == ""
    (tmp_path / "pets").rename(tmp_path / "moved")
    assert warnings(capsys, path, tmp_path / "moved") == ""
    assert len(json.loads(path.read_text())) == 1
    write_images(tmp_path / "moved" / "dog", [300])
    line = warnings(capsys, path, tmp_path / "moved")
    number = json.loads(path.read_text())[1]["train"]["images"]
    assert f"has other train images than before ({number - 1} then, {number} now): its" in line
    assert len(line.splitlines()) == 1 and "of a run never stopped" in line
    assert warnings(capsys, path, tmp_path / "moved") == ""
    Image.new("RGB", (99, 99)).save(tmp_path / "moved" / "dog" / "0050.png")  # not renamed
    assert f"({number} then, {number} now)" in warnings(capsys, path, tmp_path / "moved")
    (tmp_path / "moved" / "dog").rename(tmp_path / "moved" / "wolf")
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"on 2 classes, .* have 2, with 'wolf' for 'dog'; name"):
        warnings(capsys, path, tmp_path / "moved")
    assert path.read_bytes() == before
    for damaged in ("{", "[1]", "[{}]"):
        path.write_text(damaged)
        with pytest.raises(BadInput, match=r"data\.json is damaged"):
            warnings(capsys, path, tmp_path / "moved")


def test_runs_of_older_versions_are_told_apart(tmp_path, capsys):
    write_images(tmp_path / "pets" / "cat", range(12))
    path = epath.Path(tmp_path / "run" / "data.json")
    assert "begun by an older version" in warnings(capsys, path, tmp_path / "pets")
    assert warnings(capsys, epath.Path(tmp_path / "data.json"), "emoji") == ""


def test_arrays_have_a_checksum_too():
    assert summarize("emoji", {"train": Emoji("train"), "validation": Emoji("validation")}) == (
        "emoji: 1,712 train and 194 validation images of 9 classes"
    )
