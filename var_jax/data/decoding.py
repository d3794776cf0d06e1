"""Encoded images of any format and size to RGB crops of one size, with Pillow.

Pillow, because its antialiased Lanczos filter is the paper's and its decoder is as fast as any
(benchmarks/data.py); it works on a thread without holding Python's lock.
"""

import functools
import io
import sys
import warnings
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from var_jax.schedule import Size, shape_of

MAX_PIXELS = 100_000_000  # an image takes 4 bytes a pixel, on each thread of the pipeline
MAX_BYTES = 4 * MAX_PIXELS  # of a file
ORIENTATION = 0x0112  # the EXIF tag; what undoes its values
UPRIGHT = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))
NAMED = 20  # warnings that name their file; then every hundredth does
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG, BMP_HEADERS = STARTS[1], (12, 40, 52, 56, 64, 108, 124)

# Pillow warns about odd metadata, and about half of the sizes that it refuses.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(Exception):
    """An image cannot be decoded; the message says why."""


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Pillow's names of what is read. Others, such as EPS, would start programs."""
    Image.init()
    wanted = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def begins_like_image(start: bytes) -> bool:
    """Returns whether the first 32 bytes of a file are those of a format that `decode` knows."""
    return (
        start.startswith(STARTS)
        or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")
        or (start[4:8] == b"ftyp" and b"avi" in start[8:])
        or (start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in BMP_HEADERS)
        or (start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace())
    )


def decode(data: bytes, short: int, backdrop: str = "white") -> Image.Image:
    """The first frame of an encoded image, upright, RGB, transparency on a backdrop.

    A JPEG over four times as large as `short`, the shorter edge that will be made of it, comes
    reduced by a power of two, still at least twice that size: far cheaper, no visible difference.
    Damage to metadata loses no image; a file that ends too soon is no whole image, and is refused.

    Raises: Unreadable if it is damaged, truncated, too large or not an image.
    """
    try:
        return _decode(data, short, backdrop)
    except Unreadable:
        bare = without_metadata(data)
        if bare == data:
            raise
    return _decode(bare, short, backdrop)


def _decode(data: bytes, short: int, backdrop: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            image.draft(None, (2 * short, 2 * short))  # type: ignore[arg-type]
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Unreadable(f"{width} x {height} pixels are too many")
            image.load()
            return upright(image, backdrop)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("no image in a known format") from error
    except Exception as error:  # Each decoder has its own errors for damage.
        lines = str(error).splitlines()
        raise Unreadable(lines[0] if lines else type(error).__name__) from error


def upright(image: Image.Image, backdrop: str = "white") -> Image.Image:
    """An image of any mode upright, RGB, transparency on a backdrop.

    Raises: Unreadable if nothing says what its values mean.
    """
    turn = UPRIGHT.get(_orientation(image))
    image = _rgb(image, backdrop)
    return image if turn is None else image.transpose(Image.Transpose(turn))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Broken EXIF has as many errors; the pixels are whole.
        return 1


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG without what does not change its pixels; other formats as they are.

    Transparency, EXIF (for the orientation) and Adobe's colour transform stay if they are whole.
    """
    if data.startswith(PNG):
        kept, at = [PNG], len(PNG)
        while 0 < (length := int.from_bytes(data[at : at + 4])) + 12 <= len(data) - at:
            kind, end = data[at + 4 : at + 8], at + length + 12
            whole = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
            if not kind[0] & 32 or (whole and kind in (b"tRNS", b"eXIf")):  # lower case: ancillary
                kept.append(data[at:end])
            at = end
        return b"".join([*kept, data[at:]])
    kept, at = [data[:2]], 2
    while data.startswith(STARTS[0]) and at + 4 <= len(data) and data[at + 1] != 0xDA:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        adobe = marker == 0xEE and end - at >= 16
        if adobe or marker == 0xE1 or marker not in (*range(0xE1, 0xF0), 0xFE):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def crop(
    image: Image.Image,
    size: Size,
    resize: float,
    rng: np.random.Generator | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> UInt8[np.ndarray, "h w 3"]:
    """A crop of `size` of the image, which is resized to just cover `resize` (at least 1) sizes.

    At random with `rng`, else the centre. Only the crop is resampled (VAR §4: Lanczos to
    1.125, then a random crop). Sizes round as torchvision's Resize and CenterCrop do.
    """
    height, width = shape_of(size)
    least = [round(resize * side) for side in (width, height)]
    axis = np.argmax(np.divide(least, image.size))  # the side that is just covered
    # The product of whole numbers first: 206 · (256 / 206) is less than 256.
    sides = [int(least[axis] * side / image.size[axis]) for side in image.size]
    slack = [side - few for side, few in zip(sides, (width, height), strict=True)]
    if rng is None:
        corner = [round(s / 2) for s in slack]
    else:
        corner = [int(rng.integers(0, s, endpoint=True)) for s in slack]
    ratio = np.divide(image.size, sides)
    end = np.minimum(ratio * np.add(corner, (width, height)), image.size)
    box = (*(ratio * corner).tolist(), *end.tolist())
    return np.asarray(image.resize((width, height), resample, box))


def _rgb(image: Image.Image, backdrop: str) -> Image.Image:
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no known range")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # whose values are of 16 bits
        raise Unreadable("32-bit pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, backdrop), image).convert("RGB")
    return image.convert("RGB")


class Skipped(dict):
    """The names of images that could not be read; each is named once on stderr."""

    def add(self, name: str, reason: Unreadable) -> None:
        """Warns about one image, which the next readable one replaces."""
        mine = object()
        if self.setdefault(name, mine) is not mine:  # threads add at once, and this is atomic
            return
        count = len(self)
        if count <= NAMED or count % 100 == 0:
            # In one piece, as other threads warn too.
            sys.stderr.write(f"warning: skipped {name}: {reason} ({count} skipped)\n")
