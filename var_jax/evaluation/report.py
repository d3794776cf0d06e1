"""Figures of a finished run: how good reconstructions and samples are, and whether they are copies.

An independent classifier, trained on real pictures, says how often a sample is taken for its
class; its rate on held-out real pictures is the yardstick. Distances to the nearest training
picture, beside those of held-out pictures, tell copies from new pictures.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int32, UInt8
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC

from var_jax.data.sources import Source
from var_jax.sampling.generate import generate

HOW = {"cfg": 4.0, "top_k": 0, "top_p": 0.95}  # how judged and pictured samples are drawn


def arrays(source: Source) -> tuple[UInt8[np.ndarray, "N H W 3"], Int32[np.ndarray, " N"]]:
    """All pictures and labels of a source."""
    items = [source[i] for i in range(len(source))]
    return np.stack([i["image"] for i in items]), np.array([i["label"] for i in items])


def features(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """Pixels in [0, 1], one row an image."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def nearest_distance(
    images: UInt8[np.ndarray, "N H W 3"], among: UInt8[np.ndarray, "M H W 3"]
) -> Float[np.ndarray, " N"]:
    """Root-mean-square pixel distance, in [0, 1], to the nearest of `among`."""
    a, b = features(images), features(among)
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.sqrt(np.maximum(squared.min(1), 0) / a.shape[1])


def fit(images: UInt8[np.ndarray, "N H W 3"], labels: Int32[np.ndarray, " N"]) -> Pipeline:
    """The classifier that judges pictures."""
    classifier = make_pipeline(PCA(64, random_state=0), SVC(C=10.0))
    return classifier.fit(features(images), labels)


def scorer(source: Source) -> Callable[[np.ndarray, np.ndarray], Float[np.ndarray, " N"]]:
    """Scores (images, labels): how sure a classifier of the source's pictures is of the label."""
    classifier = fit(*arrays(source))

    def score(images: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, " N"]:
        each = classifier.decision_function(features(images))
        return each[np.arange(len(labels)), np.searchsorted(classifier.classes_, labels)]

    return score


def report(
    models, train: Source, validation: Source, seed: int, copies: int = 2
) -> dict[str, float]:
    """Figures of finished `models`; `copies` samples for each held-out picture, of its class.

    `models` is a checkpoint's (tokenizer, transformer, class names).
    """
    known, known_labels = arrays(train)
    held_out, held_out_labels = arrays(validation)
    labels = np.repeat(held_out_labels, copies)
    made = generate(
        models.transformer, models.tokenizer, labels, batch_size=64, seed=seed + 1, **HOW
    )
    samples = np.concatenate([images for images, _ in made])
    classifier = fit(known, known_labels)
    real = classifier.score(features(held_out), held_out_labels)
    agree = classifier.predict(features(samples)) == labels
    near_real, near_made = nearest_distance(held_out, known), nearest_distance(samples, known)
    return {
        "class agreement, real": real,
        "class agreement, samples": agree.mean(),
        "samples / real": agree.mean() / real,
        **{
            f"  {name}": agree[labels == i].mean()
            for i, name in enumerate(models.class_names)
            if (labels == i).any()
        },
        "distance to training, real": float(np.median(near_real)),
        "distance to training, samples": float(np.median(near_made)),
        "nearer than 5% of real": float((near_made < np.quantile(near_real, 0.05)).mean()),
    }
