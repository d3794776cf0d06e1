"""Sets of images that are measured: of an .npz, a folder or a data source, a few in memory."""

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from var_jax import BadInput
from var_jax.data.decoding import Unreadable, decode
from var_jax.data.sources import Source, open_source
from var_jax.data.sources.folders import flat_images
from var_jax.evaluation.reading import in_order
from var_jax.schedule import Size
from var_jax.tools.npz import NpzImages, is_npz
from var_jax.tools.paths import user_path

THREADS = 8  # that decode files
LONGEST = 2**16  # a side that no image has: none is reduced in decoding


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size, read in order, a few at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images, `size` at a time, the last batch maybe smaller."""
        ...


@dataclasses.dataclass(frozen=True)
class SourceImages:
    """Images of a data source as evaluation sees them: all, or `count` evenly spread over it."""

    source: Source
    count: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.source[0]["image"].shape

    @property
    def rows(self) -> Int[np.ndarray, " N"]:
        """Which images."""
        return spread(len(self.source), self.count)

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images in order, read by threads some way ahead."""
        return (batch["image"] for batch in in_order(self.source, size, self.rows))


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """The image files of a folder, in the order of their names, none of them resized."""

    folder: epath.Path
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.names), *self.read(self.names[0]).shape

    def read(self, name: str) -> UInt8[np.ndarray, "H W 3"]:
        """One image. Raises: BadInput if it cannot be decoded: none may be missing in a score."""
        try:
            return np.asarray(decode((self.folder / name).read_bytes(), LONGEST))
        except (Unreadable, OSError) as reason:
            raise BadInput(f"{self.folder / name} cannot be read: {reason}.") from reason

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images, `size` at a time. Raises: BadInput if they are of several sizes."""
        first = self.shape[1:]
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self.names), size):
                names = self.names[start : start + size]
                found = [*pool.map(self.read, names)]
                for name, image in zip(names, found, strict=True):
                    if image.shape != first:
                        sides = [f"{h} by {w}" for h, w, _ in (first, image.shape)]
                        raise BadInput(
                            f"{self.folder}: {self.names[0]} has {sides[0]} pixels, {name}"
                            f" {sides[1]}; expected images of one size."
                        )
                yield np.stack(found)


@dataclasses.dataclass(frozen=True)
class SpreadImages:
    """`count` images of an .npz, evenly spread over it."""

    images: NpzImages
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, *self.images.shape[1:]

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """These images in order, `size` at a time."""
        wanted = {*spread(self.images.shape[0], self.count).tolist()}
        every = (image for batch in self.images.batches(size) for image in batch)
        chosen = (image for number, image in enumerate(every) if number in wanted)
        while batch := [*itertools.islice(chosen, size)]:
            yield np.stack(batch)


def open_images(
    spec: str, split: str = "train", size: Size | None = None, count: int | None = None
) -> ImageSet:
    """The images of an .npz or of a folder without folders of classes, at their own size, or of a
    data source at `size` pixels: all, or `count` evenly spread where there are more.

    Raises: BadInput if there are none, or of a data source no size is given.
    """
    if is_npz(spec):
        images = NpzImages(spec)
        if count is None or count >= images.shape[0]:
            return images
        return SpreadImages(images, count)
    if names := flat_folder(spec):
        chosen = tuple(names[i] for i in spread(len(names), count))
        return FolderImages(user_path(spec), chosen)
    if size is None:
        raise BadInput(f"{spec!r} is no .npz and no folder of images (without folders in it).")
    return SourceImages(open_source(spec, split, size, resize=1.0), count)


def is_source(spec: str) -> bool:
    """Whether what names images names a data source: no .npz, and no folder of images alone."""
    return not is_npz(spec) and not flat_folder(spec)


def flat_folder(spec: str) -> tuple[str, ...]:
    """The names of the images in a folder that holds images and no folders, else none."""
    if spec == "emoji" or not (folder := user_path(spec)).is_dir():
        return ()
    return flat_images(folder)


def spread(most: int, count: int | None) -> Int[np.ndarray, " N"]:
    """Numbers below `most`: all, or `count` that are evenly spread."""
    return np.linspace(0, most - 1, min(count or most, most)).round().astype(int)


def grouped_by_class(labels: Int[np.ndarray, " N"]) -> bool:
    """Whether neighbours share a class more often than in a random order, by four deviations."""
    _, counts = np.unique(labels, return_counts=True)
    pairs, chance = len(labels) - 1, ((counts / len(labels)) ** 2).sum()
    alike = pairs - np.count_nonzero(np.diff(labels))
    return bool(alike > pairs * chance + 4 * np.sqrt(pairs * chance * (1 - chance)))
