"""Images a second that one core decodes and crops for training at 256 px, and where time goes.

    python benchmarks/data.py [--folder DIR] [--images_per_second 2000] [--rounds 20]

Images are the JPEGs of DIR, else noise with the spectrum of photographs, 500x375. simplejpeg and
OpenCV are compared where installed. Rates are per second of CPU time, the median of rounds, so that
other work on the machine matters little.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from var_jax.data.decoding import crop, decode
from var_jax.data.pipeline import epoch
from var_jax.data.sources import EncodedImages, ImageSource

SIZE, RESIZE = 256, 1.125
SHORT = round(SIZE * RESIZE)


def main() -> None:
    """Prints a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="JPEGs to read")
    parser.add_argument("--images_per_second", type=float, default=2000, help="what training takes")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    paths = sorted(args.folder.glob("*.jp*g"))[:50] if args.folder else []
    files = [path.read_bytes() for path in paths] or [textured(seed) for seed in range(8)]
    print(f"{len(files)} JPEGs of {np.mean([len(f) for f in files]) / 1000:.0f} kB")
    for name, rate in rates(ways(), files, args.rounds).items():
        print(f"| {name} | {rate:.0f} |")
    rate = pipeline_rate(files)
    print(f"| the whole pipeline, with threads and batches | {rate:.0f} |")
    cores = args.images_per_second / rate
    print(f"{args.images_per_second:.0f} images/s need {cores:.1f} cores like this one")


def ways() -> dict[str, Callable[[bytes], object]]:
    """Ways from a file to a crop, or part of the way, by name."""
    found: dict[str, Callable[[bytes], object]] = {
        "Pillow, decoding alone": lambda data: decode(data, SHORT),
        "Pillow (var_jax)": lambda data: crop(decode(data, SHORT), SIZE, RESIZE),
    }
    try:
        import cv2
        import simplejpeg
    except ImportError:
        return found
    read = simplejpeg.decode_jpeg
    cv2.setNumThreads(1)

    def area(data: bytes) -> np.ndarray:
        """Averages over areas, another filter than the paper's."""
        image = read(data)
        scale = SHORT / min(image.shape[:2])
        height, width = (round(side * scale) for side in image.shape[:2])
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        return resized[top : top + SIZE, left : left + SIZE]

    return found | {
        "simplejpeg, decoding alone": read,
        "simplejpeg, Pillow's Lanczos": lambda data: crop(
            Image.fromarray(read(data)), SIZE, RESIZE
        ),
        "simplejpeg, OpenCV's area filter": area,
    }


def rates(
    ways: dict[str, Callable[[bytes], object]], files: list[bytes], rounds: int
) -> dict[str, float]:
    """Files per CPU second of this thread, of each way in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            started = time.thread_time()
            for data in files:
                function(data)
            times[name].append((time.thread_time() - started) / len(files))
    return {name: 1 / statistics.median(found) for name, found in times.items()}


def pipeline_rate(files: list[bytes], count: int = 1280) -> float:
    """Images per CPU second of all threads."""
    images = EncodedImages(count, lambda i: (files[i % len(files)], 0, str(i)), ("one",))
    source, rates = ImageSource(images, SIZE, RESIZE), []
    for _ in range(3):
        started = time.process_time()
        for _ in epoch(source, 64, rows=range(count), seed=0):
            pass
        rates.append(count / (time.process_time() - started))
    return statistics.median(rates)


def textured(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG of noise whose amplitude falls with frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    waves = np.fft.fft2(rng.normal(size=(3, height, width))) / (frequency + 1 / width) ** 1.2
    image = np.fft.ifft2(waves).real
    image = 128 + 50 * (image - image.mean()) / image.std()
    file = io.BytesIO()
    pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


if __name__ == "__main__":
    main()
