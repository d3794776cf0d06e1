"""Likelihoods are exact, whatever the batch size and the mesh, and agree with the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import var_jax
from var_jax.data.sources import ArraySource, open_source
from var_jax.evaluation import likelihood
from var_jax.evaluation.image_sets import spread
from var_jax.evaluation.likelihood import (
    class_log_likelihoods,
    class_scores,
    likelihood_figures,
    log_likelihood,
)
from var_jax.models.tokenizer import encode_images
from var_jax.schedule import num_tokens, slices
from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.rows import in_batches
from var_jax.training.losses import cross_entropy_metrics


@pytest.fixture(scope="module")
def models():
    return var_jax.load("emoji").models


@pytest.fixture(scope="module")
def sampled(models):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, models.tokenizer.config.vocab_size, (5, num_tokens(scales(models))))
    return tokens.astype(np.int32), np.array([8, 0, 9, 3, 3], np.int32)  # 9: no class


def scales(models):
    return models.transformer.config.patch_nums


@pytest.mark.slow
def test_it_is_the_loss_by_scale(models, sampled):
    tokens, labels = sampled
    found = log_likelihood(models.tokenizer.quantizer, models.transformer, tokens, labels)
    inputs = models.tokenizer.quantizer.teacher_forcing_inputs(jnp.asarray(tokens))
    logits = models.transformer(jnp.asarray(labels), inputs)
    loss, by_scale = cross_entropy_metrics(logits, jnp.asarray(tokens), scales(models))
    assert found.dtype == np.float64 and found.shape == (5, len(scales(models)))
    np.testing.assert_allclose(found.sum(1), -loss * tokens.shape[1], rtol=1e-5)
    last = slices(scales(models))[-1]
    wanted = -by_scale["loss_last"] * (last.stop - last.start)
    np.testing.assert_allclose(found[:, -1], wanted, rtol=1e-5)


@pytest.mark.slow
def test_figures_of_a_set_are_means_over_its_images(models, tmp_path):
    source, folder = open_source("emoji", "validation", 32), epath.Path(tmp_path)
    found = likelihood_figures(models.tokenizer, models.transformer, source, folder, count=5)
    items = [source[int(i)] for i in spread(len(source), 5)]
    images, labels = (np.stack([item[name] for item in items]) for name in ("image", "label"))
    tokens = in_batches(encode_images, models.tokenizer, images)
    each = log_likelihood(models.tokenizer.quantizer, models.transformer, tokens, labels)
    np.testing.assert_allclose(found["loss"], -each.mean(0).sum() / tokens.shape[1], rtol=1e-6)
    np.testing.assert_allclose(found["bits_per_image"], -each.sum(1).mean() / np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_batches_and_meshes_change_nothing(models, sampled):
    alone = log_likelihood(models.tokenizer.quantizer, models.transformer, *sampled)
    batched = log_likelihood(models.tokenizer.quantizer, models.transformer, *sampled, batch_size=2)
    np.testing.assert_allclose(batched, alone, rtol=1e-5)
    there = var_jax.load("emoji", mesh=make_mesh(4, 2, 1)).models
    with jax.set_mesh(make_mesh(4, 2, 1)):
        split = log_likelihood(there.tokenizer.quantizer, there.transformer, *sampled)
    np.testing.assert_allclose(split, alone, rtol=1e-4)


def test_ranks_of_classes(models, tmp_path, monkeypatch):
    """The label is first, fifth, sixth, as likely as all others, and NaN."""
    parts, folder = (models.tokenizer, models.transformer), epath.Path(tmp_path)
    each = np.arange(7.0) * np.ones((5, 1))
    each[3], each[4] = 1.0, np.nan
    labels = np.array([6, 2, 1, 0, 0], np.int32)
    monkeypatch.setattr(likelihood, "in_batches", lambda *_: labels)
    monkeypatch.setattr(likelihood, "class_log_likelihoods", lambda *_: each)
    names = tuple("abcdefg")
    source = ArraySource(np.zeros((5, 8, 8, 3), np.uint8), labels, names, 8)
    run = lambda: likelihood.classification_figures(*parts, source, folder)
    assert run() == {"zero_shot_accuracy": 0.2, "zero_shot_accuracy_top5": 0.4}
    monkeypatch.setattr(likelihood, "class_log_likelihoods", None)  # what is done is not done again
    assert run() == {"zero_shot_accuracy": 0.2, "zero_shot_accuracy_top5": 0.4}


@pytest.mark.slow
def test_the_class_of_samples_is_found(models):
    model = var_jax.load("emoji")
    labels = np.array([0, 2, 8, 8], np.int32)
    tokens = model.sample_tokens(labels, seed=0)
    each = class_log_likelihoods(models.tokenizer.quantizer, models.transformer, tokens)
    assert each.shape == (4, 9) and (each.argmax(1) == labels).mean() >= 0.75
    scores = class_scores(models.tokenizer.quantizer, models.transformer, tokens, labels)
    others = class_scores(models.tokenizer.quantizer, models.transformer, tokens, labels[::-1])
    assert (scores[:3] > others[:3]).sum() >= 2
