"""Sets of images are read whole and in order; what cannot be compared is told."""

import io

import numpy as np
import pytest
from PIL import Image

from var_jax import BadInput
from var_jax.evaluation.image_sets import (
    FolderImages,
    flat_folder,
    grouped_by_class,
    open_images,
)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ten images, two of them in another format, one file that is none."""
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 9, 3), np.uint8)
    for i, image in enumerate(images):
        write(tmp_path / "flat" / f"{i:02}.{'bmp' if i < 2 else 'png'}", image)
    (tmp_path / "flat" / "labels.csv").write_text("0,1")
    return tmp_path / "flat", images


def test_a_folder_is_read_in_the_order_of_names(folder):
    path, images = folder
    found = open_images(str(path))
    assert isinstance(found, FolderImages) and found.shape == images.shape
    parts = [*found.batches(4)]
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), images)


def test_folders_of_classes_and_the_emoji_are_data_sources(folder, monkeypatch):
    path, images = folder
    write(path.parent / "classes" / "cat" / "1.png", images[0])
    assert not flat_folder(str(path.parent / "classes"))
    assert not flat_folder(f"idx:{path}") and not flat_folder(str(path.parent / "none"))
    path.rename(path.parent / "emoji")
    monkeypatch.chdir(path.parent)
    assert not flat_folder("emoji") and flat_folder("./emoji")


def test_grey_images_and_large_jpegs_come_whole(tmp_path):
    write(tmp_path / "a.png", np.full((300, 200), 7, np.uint8))
    encoded = io.BytesIO()
    Image.new("RGB", (200, 300), (7, 7, 7)).save(encoded, "JPEG")
    (tmp_path / "b.jpg").write_bytes(encoded.getvalue())
    assert open_images(str(tmp_path)).shape == (2, 300, 200, 3)
    assert [(part == 7).all() for part in open_images(str(tmp_path)).batches(1)] == [True, True]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("05.png", np.zeros((6, 8, 3), np.uint8), r"00.bmp has 6 by 9 pixels, 05.png 6 by 8;"),
        ("05.png", b"\x89PNG\r\n\x1a\n and no more", r"05.png cannot be read"),
        ("05.png", b"hello", r"05.png cannot be read \(.*\); mend or remove it"),
        ("00.bmp", b"", r"00.bmp cannot be read \(.*\); mend or remove it"),
    ],
)
def test_images_that_do_not_fit_are_told(folder, name, content, sentence):
    path, _ = folder
    (path / name).unlink()
    write(path / name, content) if isinstance(content, np.ndarray) else (path / name).write_bytes(
        content
    )
    with pytest.raises(BadInput, match=sentence):
        [*open_images(str(path)).batches(4)]


RANDOM = np.random.default_rng(0)


def some_right(labels, share):
    """Classes as they are predicted: a share of the labels, the others any."""
    return np.where(RANDOM.random(len(labels)) < share, labels, RANDOM.permutation(labels))


@pytest.mark.parametrize(
    ("labels", "grouped"),
    [
        (np.arange(5000) % 10, False),
        (np.repeat(np.arange(10), 500), True),
        (np.repeat([9, 3, 5], [10, 2, 70]), True),
        (np.tile(np.repeat(np.arange(10), 50), 10), True),  # of ten hosts, each sorted
        (np.repeat(np.arange(1000), 6), True),
        (RANDOM.integers(0, 2, 5000), False),
        (RANDOM.integers(0, 1000, 6000), False),
        (some_right(np.repeat(np.arange(1000), 6), 0.2), True),
        (some_right(np.arange(6000) % 1000, 0.2), False),
        (RANDOM.permutation(np.repeat([0, 1], [4900, 100])), False),
        (np.zeros(5000, int), False),
    ],
)
def test_labels_in_order_of_classes(labels, grouped):
    assert grouped_by_class(labels) == grouped


def test_what_is_no_set_of_images(tmp_path):
    for spec in ("none", str(tmp_path)):
        with pytest.raises(BadInput, match=r"no \.npz and no folder of images"):
            open_images(spec)
