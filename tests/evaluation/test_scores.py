"""Scores are those of torch-fidelity, the ADM evaluator and scikit-image."""

import functools

import jax
import numpy as np
import pytest
from golden_cases import load

from var_jax import BadInput
from var_jax.evaluation import scores
from var_jax.evaluation.frechet import frechet
from var_jax.evaluation.scores import (
    inception_score,
    kernel_distance,
    precision_recall,
    psnr,
    squared_distances,
    ssim,
)
from var_jax.evaluation.statistics import Moments
from var_jax.sharding.mesh import make_mesh

CASE = load("evaluation")
REFERENCE, SAMPLES = CASE["features_reference"], CASE["features_samples"]


def frechet_distance(a, b):
    return frechet(a.mean, a.covariance, b.mean, b.covariance)


def test_moments_are_the_same_in_any_parts_and_order():
    features = 1000 + REFERENCE
    cuts = np.split(np.random.default_rng(0).permutation(features), [0, 1, 7, 8, 300])
    parts = [Moments.of(part) for part in cuts]
    total = functools.reduce(Moments.__add__, parts[1:], parts[0])
    assert total.count == len(features)
    np.testing.assert_allclose(total.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(total.covariance, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("a", "b", "keys", "atol"),
    [
        (REFERENCE, SAMPLES, ("fid_tf", "fid_adm"), 0),
        (REFERENCE[:20], SAMPLES[:30], ("fid_tf_singular", "fid_adm_singular"), 0),
        (REFERENCE, REFERENCE, ("fid_tf_same",), 1e-6),
    ],
)
def test_frechet_distance(a, b, keys, atol):
    for pair in ((a, b), (b, a)):
        found = frechet_distance(*map(Moments.of, pair))
        np.testing.assert_allclose(found, [CASE[key] for key in keys], rtol=1e-6, atol=atol)


def test_frechet_distance_of_one_set_of_few_images_is_zero():
    """Fewer images than features: roots of eigenvalues near zero would add up."""
    features = np.maximum(np.random.default_rng(0).standard_normal((30, 120)) + 3, 0)
    moments = Moments.of(features)
    assert abs(frechet_distance(moments, moments)) < 1e-9
    moved = Moments.of(features + 0.01)
    np.testing.assert_allclose(frechet_distance(moments, moved), 120 * 0.01**2, rtol=1e-6)
    assert frechet(*[np.zeros(3), np.zeros((3, 3))] * 2) == 0


def test_inception_score():
    logits = CASE["logits"]
    expected = CASE["isc_tf_mean"], CASE["isc_tf_std"]
    np.testing.assert_allclose(inception_score(logits, splits=10), expected, rtol=1e-6)
    mean, _ = inception_score(logits, block=100)
    np.testing.assert_allclose(mean, CASE["is_adm_split100"], rtol=1e-6)
    assert inception_score(logits) == inception_score(logits, splits=1)
    sure = np.where(np.eye(4, dtype=bool), 0.0, -1e4)
    np.testing.assert_allclose(inception_score(sure), (4, 0), rtol=1e-6)


def test_kernel_distance(monkeypatch):
    for rows in (1000, 7):
        monkeypatch.setattr(scores, "ROWS", rows)
        found = kernel_distance(SAMPLES, REFERENCE)
        np.testing.assert_allclose(found, CASE["kid_unbiased_all"], rtol=1e-9)


@pytest.mark.parametrize(("tile", "rows"), [(10_000, 1_000), (100, 50)])
def test_precision_and_recall(monkeypatch, tile, rows):
    monkeypatch.setattr(scores, "TILE", tile)
    monkeypatch.setattr(scores, "ROWS", rows)
    found = precision_recall(SAMPLES, REFERENCE)
    np.testing.assert_allclose(found, (CASE["precision"], CASE["recall"]), rtol=1e-6)
    adm = precision_recall(SAMPLES, REFERENCE, adm=True)
    np.testing.assert_allclose(adm, adm_precision_recall(SAMPLES, REFERENCE), rtol=1e-12)


def test_precision_and_recall_beyond_float16():
    """Where a squared distance is infinite in float16, the tile is float32."""
    large = precision_recall(100 * SAMPLES, 100 * REFERENCE, adm=True)
    assert large == precision_recall(100 * SAMPLES, 100 * REFERENCE)


def test_under_a_mesh_one_device_computes(monkeypatch):
    """A program under the mesh would be one of all processes, and only process 0 is here."""
    places = []

    def fits_half(x, y):
        places.append(squared_distances(x[:9], y[:9]).devices())
        return True

    monkeypatch.setattr(scores, "fits_half", fits_half)
    with jax.set_mesh(make_mesh(-1, 1, 1)):
        precision_recall(SAMPLES, REFERENCE, adm=True)
        assert not jax.sharding.get_mesh().empty
    assert places and all(place == {jax.local_devices()[0]} for place in places)


def adm_precision_recall(samples, reference):
    """In NumPy's own float16, the products in float32, as a GPU computes them."""

    def distances(x, y):
        x, y = x.astype(np.float16), y.astype(np.float16)
        norms = [(z * z).astype(np.float32).sum(1).astype(np.float16) for z in (x, y)]
        product = (x.astype(np.float32) @ y.T.astype(np.float32)).astype(np.float16)
        return np.maximum(norms[0][:, None] - 2 * product + norms[1][None], 0)

    radius = lambda x: np.sort(distances(x, x), axis=1)[:, 3]
    near = distances(samples, reference)
    precision = (near <= radius(reference)[None]).any(1).mean()
    return precision, (near <= radius(samples)[:, None]).any(0).mean()


def test_half_distances_are_float16():
    found = np.asarray(squared_distances(SAMPLES[:9], REFERENCE[:5], half=True))
    np.testing.assert_array_equal(found, found.astype(np.float16))
    exact = np.asarray(squared_distances(SAMPLES[:9], REFERENCE[:5]))
    assert 0 < np.abs(found / exact - 1).max() < 0.02


def test_psnr_and_ssim():
    case = load("features")
    images, others = case["images"], case["others"]
    np.testing.assert_allclose(psnr(images, others), case["psnr"], rtol=1e-9)
    np.testing.assert_allclose(ssim(images, others), case["ssim"], atol=1e-6)
    assert np.isinf(psnr(images, images)).all()
    many = [np.resize(x, (70, *x.shape[1:])) for x in (images, others)]  # of few at a time
    for score in (psnr, ssim):
        np.testing.assert_allclose(score(*many), np.resize(score(images, others), 70), atol=1e-6)
    np.testing.assert_allclose(ssim(images, images), 1, atol=1e-6)


NAN = np.where(np.arange(300)[:, None] == 7, np.nan, SAMPLES)
IMAGES = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Moments.of(NAN), r"features: image 7 has values that are not finite \(1 of 300"),
        (lambda: Moments.of(SAMPLES[:1]).covariance, "at least 2 images, found 1"),
        (lambda: Moments.of(SAMPLES) + Moments.of(SAMPLES[:, :9]), "of 48 and of 9 numbers"),
        (lambda: frechet_distance(Moments.of(SAMPLES), Moments.of(SAMPLES[:, :9])), "one network"),
        (lambda: frechet(*[np.full(2, np.inf), np.eye(2)] * 2), "statistics hold values"),
        (lambda: inception_score(CASE["logits"][:1]), "1 images; expected at least 2"),
        (lambda: inception_score(CASE["logits"][:5], splits=10), "5 images; expected at least 10"),
        (lambda: kernel_distance(NAN, REFERENCE), "samples: image 7"),
        (lambda: kernel_distance(SAMPLES, REFERENCE[:1]), "reference: 1 images"),
        (lambda: kernel_distance(SAMPLES, REFERENCE[:, :9]), "48 features, the reference 9"),
        (
            lambda: precision_recall(SAMPLES[:3], REFERENCE),
            "3 images; expected at least 4",
        ),
        (lambda: psnr(IMAGES, IMAGES[:1]), "are no pairs"),
        (lambda: ssim(IMAGES[:0], IMAGES[:0]), "are no pairs"),
        (lambda: ssim(IMAGES[:, :9], IMAGES[:, :9]), "9 by 16 pixels; SSIM takes 11"),
    ],
)
def test_what_has_no_score_is_refused(call, sentence):
    with pytest.raises(BadInput, match=sentence):
        call()
