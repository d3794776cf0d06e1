"""The baselines learn, and their steps compute the same on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_tasks import TOKENIZER, TRAIN_TRANSFORMER, TRANSFORMER, assert_moved_alike, data, train

from var_jax.models.patch_codec import make_tokenizer
from var_jax.training.autoregressive import autoregressive_task
from var_jax.training.diffusion import diffusion_task, sample_times

VQ = dataclasses.replace(TOKENIZER, patch_nums=(4,))
BODY = dict(patch_nums=(4,), depth=1, width=32, num_heads=2)
RASTER = dataclasses.replace(TRANSFORMER, kind="raster", **BODY)
DIT = dataclasses.replace(TRANSFORMER, kind="dit", gamma_std=0.0, **BODY)
FLOW = dataclasses.replace(TRAIN_TRANSFORMER, steps=60, learning_rate=0.16, time_sampling="uniform")
TASKS = {
    "raster": autoregressive_task(RASTER, TRAIN_TRANSFORMER),
    "dit": diffusion_task(DIT, FLOW),
}


@functools.cache
def tokenizer():
    """Of random weights, of which nothing is compiled."""
    abstract = jax.eval_shape(lambda: make_tokenizer(VQ, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), abstract)


@functools.cache
def trained(kind):
    return train(None, TASKS[kind], tokenizer(), steps=60 if kind == "dit" else 8)


@pytest.mark.slow
def test_the_raster_model_learns():
    losses = trained("raster")[0][:, 0]
    assert losses[0] == pytest.approx(np.log(64), rel=0.01) and losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_the_dit_learns():
    """A new one predicts nothing: the error is the variance of noise - x_0, which is 2."""
    losses = trained("dit")[0][:, 0]
    assert losses[0] == pytest.approx(2, rel=0.1) and losses[-10:].mean() < losses[:10].mean() - 0.1


@pytest.mark.slow
def test_the_dit_keeps_the_statistics_of_its_latents():
    learner = trained("dit")[1].transformer
    latent = make_latents()
    for dit in (learner.params, learner.ema):  # all batches are one
        np.testing.assert_allclose(dit.latent_mean[...], latent.mean((0, 1, 2)), atol=1e-4)
        np.testing.assert_allclose(dit.latent_std[...], latent.std((0, 1, 2)), rtol=1e-3)
        assert dit.latent_batches[...] == 60


@pytest.mark.slow
def test_parts_of_a_batch_have_the_statistics_of_the_whole():
    task = diffusion_task(DIT, dataclasses.replace(FLOW, accumulate=4))
    latent = make_latents()
    state = jax.jit(task.init)(jax.random.key(0))
    batch = {"latent": latent, "label": data()["label"]}
    state, _ = jax.jit(task.train_step)(state, batch, {}, jax.random.key(0))
    dit = state.transformer.params
    np.testing.assert_allclose(dit.latent_mean[...], latent.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(dit.latent_std[...], latent.std((0, 1, 2)), rtol=1e-3)


@functools.cache
def make_latents():
    image = data()["image"] / np.float32(127.5) - 1
    encode = jax.jit(lambda tokenizer, image: tokenizer.latent(image))
    return np.asarray(encode(jax.tree.map(jnp.asarray, tokenizer()), image))


@pytest.mark.slow
def test_cached_latents_give_the_same_loss_as_images():
    task, cached = TASKS["dit"], {"latent": make_latents(), "label": data()["label"]}
    state = jax.jit(task.init)(jax.random.key(0))
    _, metrics = jax.jit(task.train_step)(state, cached, {}, jax.random.key(0))
    assert metrics["loss"] == pytest.approx(trained("dit")[0][0, 0], rel=1e-5)


@pytest.mark.slow
def test_the_validation_loss_of_a_dit_needs_no_luck():
    task, state = TASKS["dit"], jax.tree.map(jnp.asarray, trained("dit")[1])
    cached = {"latent": make_latents(), "label": data()["label"]}
    run = jax.jit(task.eval_step)
    loss = run(state, cached, {})["loss"]
    assert loss.shape == (16,) and 0 < loss.mean() < 2.2
    np.testing.assert_array_equal(loss, run(state, cached, {})["loss"])


@pytest.mark.parametrize(("how", "quarter"), [("uniform", 0.25), ("logit_normal", 0.1360)])
def test_times(how, quarter):
    """The share below a quarter: of a logit-normal that of a normal below -log 3."""
    time = np.asarray(sample_times(jax.random.key(0), 20_000, how))
    assert ((time > 0) & (time < 1)).all() and time.mean() == pytest.approx(0.5, abs=0.01)
    assert (time < 0.25).mean() == pytest.approx(quarter, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raster", "dit"])
def test_meshes_agree(kind):
    seen, state = train(None, TASKS[kind], tokenizer(), steps=5)
    here, there = train((2, 2, 2), TASKS[kind], tokenizer(), steps=5)
    np.testing.assert_allclose(here, seen, rtol=1e-3)
    assert_moved_alike(TASKS[kind], state, there)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raster", "dit"])
def test_plain_layers_and_parts_of_a_batch(kind):
    """Each compiles, and learns."""
    config = RASTER if kind == "raster" else DIT
    make = autoregressive_task if kind == "raster" else diffusion_task
    training = dataclasses.replace(FLOW, accumulate=2, learning_rate=0.08)
    task = make(dataclasses.replace(config, adaln=kind == "dit", remat="selective"), training)
    losses = train(None, task, tokenizer(), steps=60)[0][:, 0]
    assert losses[-10:].mean() < losses[:10].mean() - 0.05
