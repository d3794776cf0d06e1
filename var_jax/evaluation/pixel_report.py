"""Figures of a finished run: how good reconstructions and samples are, and whether they are copies.

An independent classifier, trained on real pictures, says how often a sample is taken for its
class; its rate on held-out real pictures is the yardstick. Distances to the nearest training
picture or mirror image of one, beside those of held-out pictures, tell copies from new pictures:
all of them as the tokenizer reconstructs them, so that a copy is near and has no error of the
tokenizer between. Distances between pictures of one class, as they are, say how much they vary.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int32, UInt8
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC

from var_jax.data.sources import Source

COPY = 0.03  # a distance: 8 of 255 levels, half of what the tokenizer of the emoji is off


def arrays(
    source: Source, most: int = 2**26
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int32[np.ndarray, " N"]]:
    """Pictures and labels of a source, evenly thinned out to at most so many bytes."""
    count = min(len(source), max(most // source[0]["image"].nbytes, 1))
    items = [source[int(i)] for i in np.linspace(0, len(source) - 1, count).round()]
    return np.stack([i["image"] for i in items]), np.array([i["label"] for i in items])


def features(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """Pixels in [0, 1], one row an image."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def distances(
    images: UInt8[np.ndarray, "N H W 3"], among: UInt8[np.ndarray, "M H W 3"]
) -> Float[np.ndarray, "N M"]:
    """Root-mean-square pixel distances, in [0, 1]."""
    a, b = features(images), features(among)
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])


def nearest_distance(
    images: UInt8[np.ndarray, "N H W 3"], among: UInt8[np.ndarray, "M H W 3"]
) -> Float[np.ndarray, " N"]:
    """Root-mean-square pixel distance, in [0, 1], to the nearest of `among`."""
    return distances(images, among).min(1)


def variety(
    images: UInt8[np.ndarray, "N H W 3"],
    labels: Int32[np.ndarray, " N"],
    classes: Int32[np.ndarray, " C"],
) -> float:
    """Mean distance, in [0, 1], between two images of a class, over classes of two or more."""
    several = (images[labels == i] for i in classes)
    pairs = (distances(c, c)[np.triu_indices(len(c), 1)] for c in several)
    return float(np.mean([pair.mean() for pair in pairs]))


def fit(images: UInt8[np.ndarray, "N H W 3"], labels: Int32[np.ndarray, " N"]) -> Pipeline:
    """The classifier that judges pictures."""
    pixels = features(images)
    return make_pipeline(PCA(min(64, *pixels.shape), random_state=0), SVC(C=10.0)).fit(
        pixels, labels
    )


def scorer(source: Source) -> Callable[[np.ndarray, np.ndarray], Float[np.ndarray, " N"]]:
    """Scores (images, labels): how sure a classifier of the source's pictures is of the label."""
    classifier = fit(*arrays(source))

    def score(images: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, " N"]:
        each = classifier.decision_function(features(images))
        return each[np.arange(len(labels)), np.searchsorted(classifier.classes_, labels)]

    return score


def report(
    train: Source,
    validation: Source,
    draw: Callable[[Int32[np.ndarray, " N"]], UInt8[np.ndarray, "N H W 3"]],
    reconstruct: Callable[[UInt8[np.ndarray, "N H W 3"]], UInt8[np.ndarray, "N H W 3"]],
) -> dict[str, float]:
    """Figures of what `draw` makes of labels, two for each held-out picture's class.

    Distances are root-mean-square, of pixels in [0, 1]. `reconstruct` is the tokenizer, there and
    back.
    """
    known, known_labels = arrays(train)
    held_out, held_out_labels = arrays(validation)
    labels = np.repeat(held_out_labels, 2)
    samples, again = draw(labels), reconstruct(held_out)
    several = np.flatnonzero(np.bincount(held_out_labels) > 1)
    twins = [reconstruct(known), reconstruct(known[:, :, ::-1])]
    near_real, near_made = (
        np.minimum(*(nearest_distance(images, twin) for twin in twins))
        for images in (again, samples)
    )
    return {
        "validation PSNR (dB)": psnr(held_out, again),
        **(agreement(train.class_names, (known, known_labels), (held_out, held_out_labels),
                     (samples, labels)) if len(set(known_labels)) > 1 else {}),
        "distance to training, real": float(np.median(near_real)),
        "distance to training, samples": float(np.median(near_made)),
        "copies, real": float((near_real < COPY).mean()),
        "copies, samples": float((near_made < COPY).mean()),
        **({
            "distance within a class, real": variety(held_out, held_out_labels, several),
            "distance within a class, samples": variety(samples, labels, several),
        } if len(several) else {}),
    }  # fmt: skip


def psnr(images: UInt8[np.ndarray, "N H W 3"], others: UInt8[np.ndarray, "N H W 3"]) -> float:
    """Mean over pairs, in dB."""
    squared = ((features(images) - features(others)) ** 2).mean(1)
    return float(-10 * np.log10(np.maximum(squared, 1e-10)).mean())


Pictures = tuple[UInt8[np.ndarray, "N H W 3"], Int32[np.ndarray, " N"]]  # and their labels


def agreement(
    class_names: tuple[str, ...], known: Pictures, held_out: Pictures, samples: Pictures
) -> dict[str, float]:
    """How often a classifier of the known pictures is right about others."""
    classifier = fit(*known)
    real = classifier.score(features(held_out[0]), held_out[1])
    images, labels = samples
    agree = classifier.predict(features(images)) == labels
    return {
        "class agreement, real": real,
        "class agreement, samples": agree.mean(),
        "samples / real": agree.mean() / max(real, 1e-9),
        **{
            f"  {name}": agree[labels == i].mean()
            for i, name in enumerate(class_names)
            if (labels == i).any()
        },
    }
