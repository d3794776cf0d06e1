"""Encoded images of any format and size to square RGB crops, with Pillow.

Pillow, because its antialiased Lanczos filter is the paper's and its decoder is as fast as any
(benchmarks/data.py); it works on a thread without holding Python's lock.
"""

import functools
import io
import sys
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # an image takes 4 bytes a pixel, on each thread of the pipeline
ORIENTATION = 0x0112  # the EXIF tag
NAMED = 20  # warnings that name their file; then every hundredth does

# Pillow warns about half of what it refuses; `decode` has its own limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Unreadable(Exception):
    """An image cannot be decoded; the message says why."""


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Pillow's names of what is read. Others, such as EPS, would start programs."""
    Image.init()
    wanted = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def is_image(path: Path) -> bool:
    """Returns whether a file begins like an image that `decode` knows."""
    try:
        with Image.open(path, formats=known_formats()):
            return True
    except Exception:  # Each decoder has its own errors for damage.
        return False


def decode(data: bytes, short: int) -> Image.Image:
    """The first frame of an encoded image, upright, RGB, transparency on white.

    A JPEG over four times as large as `short`, the shorter edge that will be made of it, comes
    reduced by a power of two, still at least twice that size: far cheaper, no visible difference.

    Raises: Unreadable if it is damaged, truncated, too large or not an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            image.draft(None, (2 * short, 2 * short))  # type: ignore[arg-type]
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Unreadable(f"{width} x {height} pixels are too many")
            image.load()
            if image.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _rgb(image)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("no image in a known format") from error
    except Exception as error:  # Each decoder has its own errors for damage.
        lines = str(error).splitlines()
        raise Unreadable(lines[0] if lines else type(error).__name__) from error


def crop(
    image: Image.Image,
    size: int,
    resize: float,
    rng: np.random.Generator | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> UInt8[np.ndarray, "size size 3"]:
    """A square of the image whose shorter edge is `resize` (at least 1) times `size`.

    At random with `rng`, else the centre. Only the square is resampled (VAR §4.1: Lanczos to
    1.125, then a random crop). Sizes round as torchvision's Resize and CenterCrop do.
    """
    short = round(resize * size)
    scale = short / min(image.size)
    sides = [short if side == min(image.size) else int(side * scale) for side in image.size]
    slack = [side - size for side in sides]
    if rng is None:
        corner = [round(s / 2) for s in slack]
    else:
        corner = [int(rng.integers(0, s, endpoint=True)) for s in slack]
    ratio = np.divide(image.size, sides)
    end = np.minimum(ratio * np.add(corner, size), image.size)
    box = (*(ratio * corner).tolist(), *end.tolist())
    return np.asarray(image.resize((size, size), resample, box))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
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
