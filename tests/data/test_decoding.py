"""Decoding and cropping, against Pillow's plain path and against damaged files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from var_jax.data import decoding
from var_jax.data.decoding import Unreadable, begins_like_image, crop, decode


def scene(width=60, height=40):
    """A smooth colour image with a different colour in each corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


# Of (66, 99) the long side is 27, and 26 if the scale is computed first: 99 * (18 / 66) < 27.
@pytest.mark.parametrize("size", [(57, 40), (40, 57), (31, 31), (200, 40), (66, 99), (99, 66)])
def test_crop_is_a_part_of_the_whole_resized(size):
    image, side, resize = noise(*size), 16, 1.125
    short = round(resize * side)
    whole = [int(short * s / min(size)) for s in size]  # as torchvision
    whole = image.resize(whole, Image.Resampling.LANCZOS)
    wanted = np.asarray(whole).astype(int)
    left, top = (round((s - side) / 2) for s in whole.size)
    centre = crop(image, side, resize)
    assert centre.shape == (side, side, 3) and centre.dtype == np.uint8
    assert np.abs(centre - wanted[top : top + side, left : left + side]).max() <= 1
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(300):
        found = crop(image, side, resize, rng).astype(int)
        fits = [
            (x, y)
            for y in range(whole.size[1] - side + 1)
            for x in range(whole.size[0] - side + 1)
            if np.abs(found - wanted[y : y + side, x : x + side]).max() <= 1
        ]
        assert fits
        places.add(fits[0])
    corners = [(s - side) for s in whole.size]
    if max(corners) < 20:  # then 300 draws reach nearly every place, the ends included
        assert {x for x, _ in places} == set(range(corners[0] + 1))
        assert {y for _, y in places} == set(range(corners[1] + 1))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (31, 31)])
def test_oblong_crops(size):
    image = noise(*size).point(lambda value: 96 + value // 4)  # nothing is clipped between passes
    whole = crop(image, (18, 27), 1.0)
    assert whole.shape == (18, 27, 3)
    turned = crop(image.transpose(Image.Transpose.TRANSPOSE), (27, 18), 1.0)
    assert np.abs(whole.astype(int) - turned.swapaxes(0, 1)).max() <= 1  # passes in other order
    if size == (60, 40):  # the same shape: the whole image is resized
        np.testing.assert_array_equal(whole, image.resize((27, 18), Image.Resampling.LANCZOS))
    assert crop(image, (18, 27), 1.125, np.random.default_rng(0)).shape == (18, 27, 3)


def test_crop_of_the_image_itself_changes_nothing():
    image = noise(16, 16)
    assert (crop(image, 16, 1.0, np.random.default_rng(0)) == np.asarray(image)).all()


ADOBE = scene().convert("CMYK")
GREY16 = Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    "data",
    [
        encoded(scene(), "JPEG", quality=95),
        encoded(scene(), "WEBP", lossless=True),
        encoded(scene().quantize(256), "PNG"),
        encoded(ADOBE, "JPEG", quality=95),
        encoded(ADOBE, "TIFF"),
        encoded(scene(), "GIF", save_all=True, append_images=[noise(60, 40)]),
        encoded(scene(), "PNG", bits=8),
    ],
    ids=["jpeg", "webp", "palette", "cmyk jpeg", "cmyk tiff", "animated", "png"],
)
def test_formats_come_out_alike(data):
    image = decode(data, 20)
    assert image.mode == "RGB" and image.size == (60, 40)
    error = np.abs(np.asarray(image).astype(int) - np.asarray(scene()))
    assert error.mean() < 12 and np.percentile(error, 90) < 40


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_8_and_16_bits(kind):
    grey = np.asarray(scene().convert("L"))
    for image in (GREY16, scene().convert("L")):
        found = np.asarray(decode(encoded(image, kind), 20)).astype(int)
        assert np.abs(found - grey[..., None]).max() <= 1


def test_transparent_is_white():
    image = scene().convert("RGBA")
    image.putalpha(Image.fromarray(np.full((40, 60), [0] * 30 + [255] * 30, np.uint8)))
    found = np.asarray(decode(encoded(image, "PNG"), 20))
    assert (found[:, :30] == 255).all() and (found[:, 30:] == np.asarray(scene())[:, 30:]).all()


def test_exif_rotation_is_undone():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right by 90 degrees
    turned = scene().transpose(Image.Transpose.ROTATE_90)
    found = decode(encoded(turned, "JPEG", exif=exif, quality=95), 20)
    assert found.size == (60, 40)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(scene())).mean() < 5


def test_one_pixel_and_extreme_shapes():
    for size in ((1, 1), (1, 3000), (20_000, 1)):
        image = decode(encoded(noise(*size), "PNG"), 18)
        assert crop(image, 16, 1.125, np.random.default_rng(0)).shape == (16, 16, 3)
    pixel = crop(decode(encoded(Image.new("RGB", (1, 1), "red"), "PNG"), 18), 16, 1.125)
    assert (pixel == (255, 0, 0)).all()


def test_large_jpegs_come_reduced_and_look_the_same():
    large = scene(1200, 800)
    data = encoded(large, "JPEG", quality=95)
    reduced = decode(data, 72)
    assert reduced.size == (300, 200)
    ours, plain = crop(reduced, 64, 1.125).astype(int), crop(large, 64, 1.125)
    assert np.abs(ours - plain).max() <= 6
    assert decode(data, 250).size == (1200, 800)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image in a known format"),
        (b"<html>404</html>", "no image in a known format"),
        (encoded(scene(), "EPS"), "no image in a known format"),  # would start Ghostscript
        (encoded(noise(60, 40), "JPEG")[:900], "truncated"),
        (encoded(noise(60, 40), "PNG")[:-3000], "truncated"),
        (encoded(scene(), "JPEG")[:50], "(?i)truncated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "32-bit"),
    ],
    ids=["empty", "text", "eps", "half a jpeg", "half a png", "jpeg header", "floats", "32 bits"],
)
def test_unreadable(data, reason):
    with pytest.raises(Unreadable, match=reason):
        decode(data, 20)


def test_bombs(monkeypatch):
    data = encoded(Image.new("RGB", (300, 200)), "PNG")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 50_000)
    with pytest.raises(Unreadable, match="300 x 200 pixels are too many"):
        decode(data, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # beyond twice that, Pillow refuses
    with pytest.raises(Unreadable, match="exceeds limit"):
        decode(data, 20)


def png_with(kind, content, crc=None):
    """A PNG with one more chunk behind its header, perhaps with a wrong checksum."""
    whole = encoded(scene(), "PNG")
    crc = zlib.crc32(kind + content) if crc is None else crc
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    return whole[:33] + chunk + whole[33:]


def jpeg_with(marker, content):
    """A JPEG with one more segment at its beginning."""
    whole = encoded(scene(), "JPEG", quality=95)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    return whole[:2] + segment + whole[2:]


@pytest.mark.parametrize(
    "data",
    [
        png_with(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_200_000))),
        png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))),
        png_with(b"tEXt", b"a\0b", crc=1),
        png_with(b"iTXt", b"a\0\1\1abc"),
        png_with(b"prVt", b"anything", crc=1),
        *(png_with(kind, b"a") for kind in (b"pHYs", b"gAMA", b"cHRM", b"acTL", b"tIME", b"eXIf")),
        png_with(b"eXIf", b"MM\0*", crc=1),
        jpeg_with(0xE1, b"Exif\0\0garbage"),
        jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        jpeg_with(0xE2, b"ICC_PROFILE\0\x05"),
        jpeg_with(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x01\xb0\x02\0\x07\0\0\0\x20\0\0\0\x1a"),
        jpeg_with(0xED, b"Photoshop 3.0\x008BIM\x04"),
        jpeg_with(0xEE, b"Adobe"),
        jpeg_with(0xE0, b"JF"),
        encoded(scene(), "WEBP", lossless=True, exif=b"garbage", icc_profile=bytes(2_000_000)),
        encoded(scene(), "TIFF", icc_profile=bytes(2_000_000)),
        encoded(scene(), "JPEG", quality=95) + b"what a camera appends",
    ],
)
def test_metadata_loses_no_image(data):
    assert begins_like_image(data[:32])
    found = np.asarray(decode(data, 20)).astype(int)
    assert np.abs(found - np.asarray(scene())).mean() < 5


def test_orientation_survives_broken_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(scene().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    broken = whole[:33] + b"\0\0\0\1tEXta\0\0\0\0" + whole[33:]
    assert (np.asarray(decode(broken, 20)) == np.asarray(scene())).all()


def test_formats_are_known_by_their_first_bytes():
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"):
        assert begins_like_image(encoded(scene(), kind)[:32])
    for other in (
        b"",
        b"BMW is a car" * 3,
        b"P7 nothing",
        b"<svg>",
        b"RIFF....WAVEfmt ",
        b"%PDF-1",
    ):
        assert not begins_like_image(other[:32])
