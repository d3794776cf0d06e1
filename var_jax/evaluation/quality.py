"""The figures of a set of images beside a reference, under the names that papers use."""

import json
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from var_jax import BadInput
from var_jax.data.inventory import describe_data
from var_jax.data.sources import ArraySource
from var_jax.evaluation.features import (
    Features,
    Network,
    check_count,
    extract,
    feature_sizes,
    fingerprint,
)
from var_jax.evaluation.frechet import frechet
from var_jax.evaluation.image_sets import (
    ImageSet,
    SourceImages,
    grouped_by_class,
    open_images,
)
from var_jax.evaluation.scores import BLOCK, inception_score, kernel_distance, precision_recall
from var_jax.schedule import Size, shape_of
from var_jax.sharding.mesh import of_first
from var_jax.tools.npz import has_images, is_npz, is_whole, load_npz, load_others, save_npz

MOST_NEIGHBOURS = 10_000  # images of a reference that precision and recall compare with, as ADM's
MOST_SAMPLES = 50_000  # images whose neighbours are looked for, as many as papers sample
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names of ADM's arrays


class Reference(NamedTuple):
    """What samples are compared with: means and covariances by kind, and some features, or none."""

    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    pool: Float[np.ndarray, "M D"]
    count: int  # of images; 0: not known
    fingerprint: str  # of images, network and given statistics


def open_reference(
    spec: str, network: Network, folder: epath.Path, split: str, size: Size, batch_size: int = 64
) -> Reference | None:
    """The reference that `spec` names: statistics, an ADM batch, or any images.

    Statistics of images are saved in `folder`, in a file for each reference; those of the same data
    source are found again. None on processes above 0.

    Raises: BadInput if it holds neither, or features of another network.
    """
    given = load_others(spec) if is_npz(spec) else {}
    if known := without_images(spec, given, network):
        return known if jax.process_index() == 0 else None
    images, of = open_images(spec, split, size), ""
    if isinstance(images, SourceImages):
        of = identity(network, spec, split, images)
        saved = saved_reference(folder, of) if jax.process_index() == 0 else None
        if of_first(lambda: np.array(saved is not None), (), bool):
            return saved
    found = extract(network, images, folder, batch_size, "the reference")
    if jax.process_index() > 0:
        return None
    reference = reference_of(found)
    if network.name == "inception" and (stated := published(given, spec)):
        digest = fingerprint((np.frombuffer(found.fingerprint.encode(), np.uint8), stated))
        reference = Reference(reference.statistics | stated, reference.pool, 0, digest)
    named = {
        name: array
        for kind, arrays in reference.statistics.items()
        for name, array in zip(STATISTICS[kind], arrays, strict=True)
    }
    about = {
        "network": network.fingerprint, "of": of, "size": images.shape[1:3],
        "count": reference.count, "fingerprint": reference.fingerprint,
    }  # fmt: skip
    named |= {name: np.array(value) for name, value in about.items()}
    save_npz(saved_at(folder, of or reference.fingerprint), **named, features=reference.pool)
    return reference


def saved_at(folder: epath.Path, of: str) -> epath.Path:
    """Where the statistics of a reference are."""
    return folder / f"reference-{zlib.crc32(of.encode()):08x}.npz"


def check_reference(spec: str, network: Network, split: str, size: Size) -> ImageSet | None:
    """Raises BadInput for what `open_reference` would refuse, ahead of all features and samples.

    Returns its images, unless it is saved statistics.
    """
    given = load_others(spec) if is_npz(spec) else {}
    known = without_images(spec, given, network)
    statistics = known.statistics if known else published(given, spec)
    if not known and network.name != "inception":
        statistics = {}
    sizes = feature_sizes(network, size) if statistics else {}
    for kind, (mean, _) in statistics.items():
        if len(mean) != sizes[kind]:
            raise BadInput(
                f"{spec}: {STATISTICS[kind][0]} has {len(mean)} numbers; expected {sizes[kind]} of"
                f" the network {network.name}."
            )
    if "features" in given:
        check_size(spec, given["size"], size)
    if known:
        return None
    images = open_images(spec, split, size)
    check_count(images.shape[0])
    check_size(spec, images.shape[1:3], size)
    return images


def check_size(spec: str, found: Sequence[int] | np.ndarray, size: Size) -> None:
    """Raises BadInput if images are not of this size."""
    (height, width), (h, w) = found, shape_of(size)
    if (height, width) != (h, w):
        raise BadInput(
            f"{spec} is of images of {height} by {width} pixels; expected {h} by {w}, the size of"
            " the samples or --size."
        )


def without_images(spec: str, given: dict[str, np.ndarray], network: Network) -> Reference | None:
    """The reference that an .npz holds besides its images: statistics that were saved here, or of
    one without images those of InceptionV3 that others saved.

    Raises: BadInput if they are of another network, or damaged.
    """
    if "features" in given:
        return saved_by_us(spec, given, network)
    if network.name != "inception" or not {*STATISTICS["pool"]} <= {*given} or has_images(spec):
        return None
    statistics = published(given, spec)
    return Reference(statistics, np.zeros((0, 0), np.float32), 0, fingerprint(statistics))


def saved_by_us(spec: str, given: dict[str, np.ndarray], network: Network) -> Reference:
    """The reference that the arrays of an .npz are.

    Raises: BadInput if they are of another network, or one is missing.
    """
    if str(given.get("network")) != network.fingerprint:
        raise BadInput(f"{spec} holds statistics of another network than {network.name}.")
    kinds = STATISTICS if network.name == "inception" else ("pool",)
    for name in (name for kind in kinds for name in STATISTICS[kind]):
        if name not in given:
            raise BadInput(f"{spec} holds {', '.join(given)}; expected {name!r} as well.")
    features = given["features"]
    if features.ndim != 2 or features.dtype.kind != "f":
        raise BadInput(
            f"{spec}: features is {features.dtype} of shape {features.shape}; expected (N,D)."
        )
    check_count(len(features))
    wanted = {"size": ((2,), "i"), "count": ((), "i"), "fingerprint": ((), "U")}
    for name, of in wanted.items():
        if name not in given or (given[name].shape, given[name].dtype.kind) != of:
            raise BadInput(f"{spec} was not saved by this version: it has no {name}; make it anew.")
    return restored(spec, given)


def restored(spec: str, saved: dict[str, np.ndarray]) -> Reference:
    """The reference that a whole file of ours holds."""
    count, fingerprint = int(saved["count"]), str(saved["fingerprint"])
    return Reference(published(saved, spec), saved["features"], count, fingerprint)


def identity(network: Network, spec: str, split: str, images: SourceImages) -> str:
    """What tells the statistics of a data source from others: how it is opened, and its images.

    Of images in memory the checksum of all, of others that of some, with all names and sizes that
    are known.
    """
    source, checksum = images.source, 0
    for part in source.images if isinstance(source, ArraySource) else ():
        checksum = zlib.crc32(part.tobytes(), checksum)
    about = network.fingerprint, spec, split, *images.shape, describe_data(source), checksum
    return json.dumps(about)


def saved_reference(folder: epath.Path, of: str) -> Reference | None:
    """The statistics of this identity, if they are there."""
    path = saved_at(folder, of)
    saved = load_npz(path) if is_whole(path) else {}
    if str(saved.get("of")) != of:
        return None
    return restored(str(path), saved)


def reference_of(found: Features) -> Reference:
    """A set of images as the reference."""
    statistics = {}
    for kind in STATISTICS.keys() & load_npz(found.paths[0]).keys():
        moments = found.moments(kind)
        statistics[kind] = moments.mean, moments.covariance
    return Reference(
        statistics, found.rows("pool", MOST_NEIGHBOURS), found.count, found.fingerprint
    )


def held_out_images(spec: str, count: int, size: Size, split: str = "validation") -> ImageSet:
    """As many real images that are not in the reference: the floor of figures.

    Or as many as there are. Raises: BadInput if there is no such split, or too small a one, or
    images are of another size.
    """
    images = open_images(spec, split, size, count)
    check_count(images.shape[0])
    check_size(spec, images.shape[1:3], size)
    return images


def published(arrays: dict[str, np.ndarray], path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The means and covariances that an .npz holds. Raises: BadInput if shapes do not fit."""
    found = {}
    for kind, names in STATISTICS.items():
        if not {*names} <= {*arrays}:
            continue
        mean, covariance = (arrays[name] for name in names)
        floats = mean.dtype.kind == covariance.dtype.kind == "f"
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not floats:
            shapes = f"{mean.dtype} of shape {mean.shape} and {covariance.shape}"
            raise BadInput(
                f"{path}: {' and '.join(names)} are {shapes}; expected floats (D,) and (D,D)."
            )
        if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise BadInput(f"{path}: {' and '.join(names)} hold values that are not finite.")
        if not is_covariance(covariance):
            raise BadInput(
                f"{path}: {names[1]} is no covariance: that is symmetric, with no variance below 0"
                " in any direction."
            )
        found[kind] = mean, covariance
    return found


def is_covariance(matrix: Float[np.ndarray, "D D"]) -> bool:
    """Whether a matrix is its transpose with no eigenvalue below 0, both up to rounding."""
    largest = np.abs(matrix).max(initial=0)
    if not np.allclose(matrix, matrix.T, 1e-3, 1e-4 * largest):
        return False
    return bool(np.linalg.eigvalsh(matrix).min(initial=0) >= -1e-3 * np.linalg.norm(matrix))


def distance_name(network: Network) -> str:
    """What the Fréchet distance of a network's pooled features is called."""
    return "fid" if network.name == "inception" else f"fd_{network.name}"


def distance(found: Features, reference: Reference, kind: str = "pool") -> float:
    """The Fréchet distance of one kind of features."""
    moments = found.moments(kind)
    return frechet(moments.mean, moments.covariance, *reference.statistics[kind])


def mixed(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """The rows in a random order, always the same."""
    return np.random.default_rng(0).permutation(rows)


def figures(network: Network, found: Features, reference: Reference) -> dict[str, float]:
    """FID and its kin of Inception features; of other networks the same, called by their names.

    The Inception score takes blocks in file order, as the ADM evaluator does. Where that is the
    order of predicted classes it takes a fixed shuffle, and `inception_score_adm` is that of the
    file. Of more than 50,000 images KID, precision and recall take so many, evenly spread.
    """
    others = compared(network, found, reference) if len(reference.pool) else {}
    if network.name != "inception":
        named = {f"{name}_{network.name}": value for name, value in others.items()}
        return {distance_name(network): distance(found, reference)} | named
    logits = found.rows("logits")
    mixes = len(logits) > BLOCK and grouped_by_class(logits.argmax(1))
    in_file = inception_score(logits)
    score, deviation = inception_score(mixed(logits)) if mixes else in_file
    names = {"fid": "pool", "sfid": "spatial"}
    names = {name: kind for name, kind in names.items() if kind in reference.statistics}
    distances = {name: distance(found, reference, kind) for name, kind in names.items()}
    scores = {"inception_score": score, "inception_score_std": deviation}
    return distances | scores | ({"inception_score_adm": in_file[0]} if mixes else {}) | others


def compared(network: Network, found: Features, reference: Reference) -> dict[str, float]:
    """KID, precision and recall; of Inception features precision and recall as ADM's as well."""
    pool = found.rows("pool", MOST_SAMPLES)
    precision, recall = precision_recall(pool, reference.pool)
    kid = kernel_distance(pool, reference.pool)
    scores = {"kid": kid, "precision": precision, "recall": recall}
    if network.name == "inception":
        adm = precision_recall(pool, reference.pool, adm=True)
        scores |= {"precision_adm": adm[0], "recall_adm": adm[1]}
    return scores
