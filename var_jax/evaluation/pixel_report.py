"""A report for small images: are samples of their class, and are they new?

A classifier on pixels, fitted to the training set, says how often a sample is taken for its class;
its accuracy on the validation set is the yardstick. Distances to the nearest training image, or its
mirror image, beside those of validation images, tell near-copies from new images: all of them as
the tokenizer reconstructs them, so that a copy is near and has no error of the tokenizer between.
Distances between images of one class say how much they vary.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32, UInt8

from var_jax import BadInput
from var_jax.data.sources import Source
from var_jax.evaluation.scores import psnr

Classifier = Any  # a pipeline of scikit-learn
NO_CLASSIFIER = "the classifier on pixels needs scikit-learn: pip install 'var_jax[report]'."
NEAR_COPY = 0.03  # a distance: 8 of 255 levels, half of the error of the emoji's tokenizer


def arrays(
    source: Source, most: int = 2**26
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int32[np.ndarray, " N"]]:
    """Images and labels of a source, evenly thinned out to at most so many bytes."""
    count = min(len(source), max(most // source[0]["image"].nbytes, 1))
    items = [source[int(i)] for i in np.linspace(0, len(source) - 1, count).round()]
    images, labels = (np.stack([item[key] for item in items]) for key in ("image", "label"))
    return images, labels


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


def has_classifier() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def say_what_is_left_out() -> None:
    """One line where there is no classifier."""
    if not has_classifier() and jax.process_index() == 0:
        print(f"class agreement is left out: {NO_CLASSIFIER}", file=sys.stderr, flush=True)


def fit(images: UInt8[np.ndarray, "N H W 3"], labels: Int32[np.ndarray, " N"]) -> Classifier:
    """The classifier. Raises: BadInput where scikit-learn is not installed."""
    if not has_classifier():
        raise BadInput(NO_CLASSIFIER)
    from sklearn import decomposition, pipeline, svm  # takes seconds

    pixels = features(images)
    reduced = decomposition.PCA(min(64, *pixels.shape), random_state=0)
    return pipeline.make_pipeline(reduced, svm.SVC(C=10.0)).fit(pixels, labels)


def scorer(source: Source) -> Callable[[np.ndarray, np.ndarray], Float[np.ndarray, " N"]]:
    """Scores (images, labels): how sure a classifier of the source's images is of the label."""
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
    """Figures of what `draw` makes of labels, two for the class of each validation image.

    Class agreement is left out where scikit-learn is not installed. Large sets are thinned out
    evenly, to 2,700 validation and 21,800 training images of 32x32.
    Distances are root-mean-square, of pixels in [0, 1]. `reconstruct` is the tokenizer, there and
    back.
    """
    training, training_labels = arrays(train)
    held_out, held_out_labels = arrays(validation, most=2**23)
    labels = np.repeat(held_out_labels, 2)
    samples, reconstructed = draw(labels), reconstruct(held_out)
    several = np.flatnonzero(np.bincount(held_out_labels) > 1).astype(np.int32)
    references = [reconstruct(training), reconstruct(training[:, :, ::-1])]
    near = {
        name: np.minimum(*(nearest_distance(images, among) for among in references))
        for name, images in (("validation", reconstructed), ("samples", samples))
    }
    decibels = np.minimum(psnr(held_out, reconstructed), 100)  # infinite for equal images
    found = {"validation PSNR (dB)": float(decibels.mean())}
    if len(set(training_labels.tolist())) > 1 and has_classifier():
        classifier = fit(training, training_labels)
        found |= agreement(classifier, held_out, held_out_labels, "validation", ())
        found |= agreement(classifier, samples, labels, "samples", train.class_names)
        ratio = found["class agreement, samples"] / max(found["class agreement, validation"], 1e-9)
        found["class agreement, samples / validation"] = ratio
    for name, distance in near.items():
        found[f"distance to training, {name}"] = float(np.median(distance))
        found[f"near-copies, {name}"] = float((distance < NEAR_COPY).mean())
    if len(several):
        found["distance within a class, validation"] = variety(held_out, held_out_labels, several)
        found["distance within a class, samples"] = variety(samples, labels, several)
    return found


def agreement(
    classifier: Classifier,
    images: UInt8[np.ndarray, "N H W 3"],
    labels: Int32[np.ndarray, " N"],
    name: str,
    class_names: tuple[str, ...],
) -> dict[str, float]:
    """How often the classifier takes images for their class: all, and of each class named."""
    agree = classifier.predict(features(images)) == labels
    each = {f"  {n}": float(agree[labels == i].mean()) for i, n in enumerate(class_names)
            if (labels == i).any()}  # fmt: skip
    return {f"class agreement, {name}": float(agree.mean())} | each
