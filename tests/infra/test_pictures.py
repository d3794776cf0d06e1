"""Pictures hold the pixels given, where they belong."""

import numpy as np
import pytest
from PIL import Image

from var_jax import BadInput
from var_jax.infra import pictures


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), np.uint8)


def test_png_round_trip_leaves_nothing_beside(tmp_path, images):
    path = tmp_path / "new" / "a.png"
    pictures.save_png(path, images[1])
    pictures.save_png(path, images[0])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), images[0])
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_grid_places_images_row_by_row(images):
    sheet = pictures.grid(images, columns=3, pad=1)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, 3) and sheet.dtype == np.uint8
    np.testing.assert_array_equal(sheet[:4, :6], images[0])
    np.testing.assert_array_equal(sheet[5:9, 7:13], images[4])
    assert (sheet[5:, 14:] == 255).all()


def test_grid_enlarges_by_whole_pixels(images):
    sheet = pictures.grid(images[:2], columns=2, pad=0, scale=3)
    assert sheet.shape == (12, 36, 3)
    np.testing.assert_array_equal(sheet[1::3, 1::3], np.concatenate(images[:2], axis=1))


def test_rows_have_their_names_on_the_left(images):
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    sheet = pictures.labelled_rows({"red heart": images, "cat": images[:2]}, scale=1)
    left = sheet.shape[1] - (5 * 48 + 4 * pictures.GAP)
    np.testing.assert_array_equal(sheet[:32, left : left + 48], images[0])
    assert (sheet[:32, :left] < 100).any() and (sheet[32:, :left] < 100).any()
    assert (sheet[36:, left + 2 * 50 :] == 255).all()


def test_curves_writes_a_chart(tmp_path):
    x = np.arange(20)
    series = {f"chart {i}": {"train": (x, x**2), "held out": (x, x)} for i in range(4)}
    pictures.curves(tmp_path / "c.png", series)
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def saved(tmp_path, image, name="a.png", **how):
    image.save(tmp_path / name, **how)
    return np.asarray(pictures.read_picture(tmp_path / name))


def test_any_mode_is_read_as_rgb(tmp_path):
    grey = np.arange(0, 240, 20, np.uint8).reshape(3, 4)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    as_rgb = Image.fromarray(rgb)
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(grey)), rgb)
    np.testing.assert_array_equal(saved(tmp_path, as_rgb.quantize(16)), rgb)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(saved(tmp_path, deep), rgb)
    np.testing.assert_array_equal(saved(tmp_path, deep, "a.tiff"), rgb)
    cmyk = saved(tmp_path, as_rgb.convert("CMYK"), "a.tiff")
    np.testing.assert_array_equal(cmyk, rgb)


def test_what_is_transparent_is_white(tmp_path):
    black = np.zeros((2, 2, 4), np.uint8)
    black[0, 0, 3], black[0, 1, 3] = 255, 51
    shown = saved(tmp_path, Image.fromarray(black))[..., 0]
    np.testing.assert_array_equal(shown, [[0, 204], [255, 255]])
    palette = Image.fromarray(np.eye(2, dtype=np.uint8), "P")
    palette.putpalette([10, 10, 10, 20, 20, 20])
    shown = saved(tmp_path, palette, transparency=0)[..., 0]
    np.testing.assert_array_equal(shown, [[20, 255], [255, 20]])


def test_exif_turns_the_picture(tmp_path, images):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = saved(tmp_path, Image.fromarray(images[0]), exif=exif)
    np.testing.assert_array_equal(turned, np.rot90(images[0], -1))


@pytest.mark.parametrize("content", [None, b"", b"<html></html>", "cut"])
def test_what_is_no_picture(tmp_path, images, content):
    path = tmp_path / "a.png"
    if content == "cut":
        Image.fromarray(images[0].repeat(50, 0).repeat(50, 1)).save(path)
        path.write_bytes(path.read_bytes()[:-60])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.png"):
        pictures.read_picture(path)


def test_square_resizes_the_shorter_edge_and_crops_the_centre():
    wide = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (20, 1, 3)))
    np.testing.assert_array_equal(pictures.square(wide, 20)[0, :, 0], np.arange(40, 60))
    assert pictures.square(wide, 8).shape == (8, 8, 3)
    tall = pictures.square(wide.rotate(90, expand=True), 10)
    assert np.abs(tall[:, 5, 0] - np.arange(58.5, 39, -2)).max() <= 1
