"""The figures of a set of images beside a reference, under the names that papers use."""

import dataclasses
import json
import zlib
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from var_jax import BadInput
from var_jax.data.sources import SPLITS, open_source
from var_jax.evaluation.features import READ, Features, ImageSet, Network, SourceImages, extract
from var_jax.evaluation.frechet import frechet
from var_jax.evaluation.scores import inception_score, kernel_distance, precision_recall
from var_jax.sharding.mesh import of_first
from var_jax.tools.npz import NpzImages, load_npz, load_others, save_npz

MOST_NEIGHBOURS = 10_000  # images of a reference that precision and recall compare with, as ADM's
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names of ADM's arrays


class Reference(NamedTuple):
    """What samples are compared with: means and covariances by kind, and some features."""

    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    pool: Float[np.ndarray, "M D"]


def open_images(spec: str, split: str, size: int, count: int | None = None) -> ImageSet:
    """The images of an .npz, or `count`, evenly spread, of a data source at `size` pixels.

    Raises: BadInput if there are none.
    """
    if spec.endswith(".npz"):
        return NpzImages(spec)
    return SourceImages(open_source(spec, split, size, resize=1.0), count)


def open_reference(
    spec: str, network: Network, folder: epath.Path, split: str, size: int, batch_size: int = 64
) -> Reference | None:
    """The reference that `spec` names: statistics saved before, an ADM batch, or any images.

    Statistics of images are saved as reference.npz in `folder`, where those of the same data source
    are found again. None on processes above 0.

    Raises: BadInput if it holds neither, or features of another network.
    """
    given = load_others(spec) if spec.endswith(".npz") else {}
    if "features" in given:
        if str(given["network"]) != network.fingerprint:
            raise BadInput(f"{spec} holds statistics of another network than {network.name}.")
        return Reference(published(given), given["features"])
    images, path, of = open_images(spec, split, size), folder / "reference.npz", ""
    if isinstance(images, SourceImages):
        of = identity(network, spec, split, images)
        saved = saved_reference(path, of) if jax.process_index() == 0 else None
        if of_first(lambda: np.array(saved is not None), (), bool):
            return saved
    found = extract(network, images, folder, batch_size)
    if jax.process_index() > 0:
        return None
    reference = reference_of(found)
    if network.name == "inception":
        reference = reference._replace(statistics=reference.statistics | published(given))
    named = {
        name: array
        for kind, arrays in reference.statistics.items()
        for name, array in zip(STATISTICS[kind], arrays, strict=True)
    }
    about = {"network": np.array(network.fingerprint), "of": np.array(of)}
    save_npz(path, **named, **about, features=reference.pool)
    return reference


def identity(network: Network, spec: str, split: str, images: SourceImages) -> str:
    """What tells the statistics of a data source from others: its name, and some of its images."""
    some = next(dataclasses.replace(images, count=READ).batches(READ))
    about = network.fingerprint, spec, split, *images.shape, zlib.crc32(some.tobytes())
    return json.dumps(about)


def saved_reference(path: epath.Path, of: str) -> Reference | None:
    """The statistics at `path`, if they are of this identity."""
    saved = load_others(path) if path.exists() else {}
    return Reference(published(saved), saved["features"]) if str(saved.get("of")) == of else None


def reference_of(found: Features) -> Reference:
    """A set of images as the reference."""
    statistics = {}
    for kind in STATISTICS.keys() & load_npz(found.paths[0]).keys():
        moments = found.moments(kind)
        statistics[kind] = moments.mean, moments.covariance
    return Reference(statistics, found.rows("pool", MOST_NEIGHBOURS))


def held_out_images(spec: str, split: str, count: int, size: int) -> ImageSet | None:
    """As many real images of a data source that are not in the reference: the floor of figures."""
    if spec.endswith(".npz"):
        return None
    other = next(name for name in SPLITS if name != split)
    return open_images(spec, other, size, count)


def published(arrays: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The means and covariances that an .npz holds."""
    return {
        kind: (arrays[mean], arrays[covariance])
        for kind, (mean, covariance) in STATISTICS.items()
        if {mean, covariance} <= {*arrays}
    }


def figures(network: Network, found: Features, reference: Reference) -> dict[str, float]:
    """FID and its kin of Inception features; of other networks the same, called by their names."""

    def distance(kind: str) -> float:
        moments = found.moments(kind)
        return frechet(moments.mean, moments.covariance, *reference.statistics[kind])

    pool = found.rows("pool")
    precision, recall = precision_recall(pool, reference.pool)
    kid = kernel_distance(pool, reference.pool)
    if network.name != "inception":
        shared = {"kid": kid, "precision": precision, "recall": recall}
        return {f"fd_{network.name}": distance("pool")} | {
            f"{name}_{network.name}": value for name, value in shared.items()
        }
    score, deviation = inception_score(found.rows("logits"))
    adm = precision_recall(pool, reference.pool, adm=True)
    return {
        "fid": distance("pool"), "sfid": distance("spatial"), "inception_score": score,
        "inception_score_std": deviation, "precision": precision, "recall": recall,
        "precision_adm": adm[0], "recall_adm": adm[1], "kid": kid,
    }  # fmt: skip
