"""How many pictures a second one core makes ready for training at 256 px, and where time goes.

    python benchmarks/data.py [--folder DIR] [--images_per_second 2000] [--rounds 20]

Pictures are the JPEGs of DIR, else noise with the spectrum of photographs, 500x375. simplejpeg and
OpenCV are compared where installed. All figures are per second of CPU time, all ways in turn in
every round, the median taken, so that other work on the machine matters little.
"""

import argparse
import io
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image

from var_jax.data.decoding import crop, decode
from var_jax.data.pipeline import epoch
from var_jax.data.sources import EncodedImages, ImageSource

SIZE, RESIZE = 256, 1.125
SHORT = round(SIZE * RESIZE)


def main() -> None:
    """Prints one row a way of doing it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="JPEGs to read")
    parser.add_argument("--images_per_second", type=float, default=2000, help="what training eats")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    paths = sorted(args.folder.glob("*.jp*g"))[:50] if args.folder else []
    files = [path.read_bytes() for path in paths] or [textured(seed) for seed in range(8)]
    large = [enlarged(data) for data in files[:4]]
    print(f"{len(files)} JPEGs of {np.mean([len(f) for f in files]) / 1000:.0f} kB")
    measured = race(ways(files) | large_ways(large), args.rounds)
    for name, rate in measured.items():
        print(f"| {name} | {rate:.0f} |")
    rate = stream_rate(files)
    print(f"| the whole pipeline, threads and batches included | {rate:.0f} |")
    cores = args.images_per_second / rate
    print(f"{args.images_per_second:.0f} images/s need {cores:.1f} cores like this one")


def ways(files: list[bytes]) -> dict:
    """name: (function, its inputs)."""
    opened = [decode(data, SHORT) for data in files]
    found = {
        "decode: Pillow": (lambda data: decode(data, SHORT), files),
        "resize and crop: Pillow, Lanczos, the crop only": (
            lambda x: crop(x, SIZE, RESIZE),
            opened,
        ),
        "resize and crop: Pillow, Lanczos, all, then crop": (resize_all, opened),
        "both: var_jax": (lambda data: crop(decode(data, SHORT), SIZE, RESIZE), files),
    }
    try:
        import simplejpeg
    except ImportError:
        return found
    read = simplejpeg.decode_jpeg
    found |= {
        "decode: simplejpeg": (read, files),
        "both: simplejpeg, Pillow's Lanczos": (
            lambda data: crop(Image.fromarray(read(data)), SIZE, RESIZE), files
        ),
    }  # fmt: skip
    try:
        import cv2
    except ImportError:
        return found
    cv2.setNumThreads(1)

    def area(image: np.ndarray) -> np.ndarray:
        """Averages over areas, another filter than the paper's."""
        height, width = image.shape[:2]
        scale = SHORT / min(height, width)
        whole = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=3)
        top, left = (round((s - SIZE) / 2) for s in whole.shape[:2])
        return whole[top : top + SIZE, left : left + SIZE]

    return found | {
        "decode: OpenCV": (lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), 1), files),
        "resize and crop: OpenCV, area": (area, [read(data) for data in files]),
        "both: simplejpeg, OpenCV's area": (lambda data: area(read(data)), files),
    }


def large_ways(files: list[bytes]) -> dict:
    """Large JPEGs, which `decode` asks for reduced; against the same without."""
    plain = lambda data: crop(Image.open(io.BytesIO(data)).convert("RGB"), SIZE, RESIZE)
    return {
        "2000x1500: var_jax": (lambda data: crop(decode(data, SHORT), SIZE, RESIZE), files),
        "2000x1500: Pillow without draft": (plain, files),
    }


def race(ways: dict, rounds: int) -> dict[str, float]:
    """Calls per CPU second of this thread."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (function, inputs) in ways.items():
            started = time.thread_time()
            for x in inputs:
                function(x)
            times[name].append((time.thread_time() - started) / len(inputs))
    return {name: 1 / statistics.median(found) for name, found in times.items()}


def stream_rate(files: list[bytes], count: int = 1280) -> float:
    """Pictures per CPU second of all threads."""
    images = EncodedImages(count, lambda i: (files[i % len(files)], 0, str(i)), ("one",))
    source, rates = ImageSource(images, SIZE, RESIZE), []
    for _ in range(3):
        started = time.process_time()
        for _ in epoch(source, 64, rows=range(count), seed=0):
            pass
        rates.append(count / (time.process_time() - started))
    return statistics.median(rates)


def resize_all(image: Image.Image) -> np.ndarray:
    scale = SHORT / min(image.size)
    whole = image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS)
    left, top = (round((s - SIZE) / 2) for s in whole.size)
    return np.asarray(whole.crop((left, top, left + SIZE, top + SIZE)))


def textured(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Noise whose amplitude falls with frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    waves = np.fft.fft2(rng.normal(size=(3, height, width))) / (frequency + 1 / width) ** 1.2
    image = np.fft.ifft2(waves).real
    image = 128 + 50 * (image - image.mean()) / image.std()
    return jpeg(Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))


def enlarged(data: bytes) -> bytes:
    return jpeg(Image.open(io.BytesIO(data)).convert("RGB").resize((2000, 1500)))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


if __name__ == "__main__":
    main()
