"""Samplers of the baselines: exact where the answer is known, and of (seed, index) alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from var_jax import BadInput
from var_jax.config import SamplingConfig, TokenizerConfig, TransformerConfig
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.transformer import make_transformer
from var_jax.sampling.autoregressive import Weights
from var_jax.sampling.diffusion import solve
from var_jax.sampling.generate import generate_all, image_keys, sampler_of
from var_jax.sharding.mesh import make_mesh
from var_jax.training.diffusion import velocity_error

LABELS = np.array([1, 2, 0, 1, 2], np.int32)
SHARED = dict(vocab_size=16, latent_dim=8)
BODY = dict(depth=2, width=32, num_heads=2, num_classes=3)
TOKENIZER = TokenizerConfig(
    patch_nums=(3,), **SHARED, channels=8, channel_mults=(1,), num_res_blocks=0, norm_groups=4,
    patch_size=4,
)  # fmt: skip
SETTINGS = SamplingConfig(cfg=1.5, top_k=(5,), top_p=(0.9,), steps=3)


@functools.cache
def weights(kind):
    """A tokenizer and a transformer of large random weights."""
    config = TransformerConfig(kind=kind, patch_nums=(3,), **SHARED, **BODY)
    rng = np.random.default_rng(0)
    made = jax.eval_shape(
        lambda: (
            make_tokenizer(TOKENIZER, rngs=nnx.Rngs(0)),
            make_transformer(config, rngs=nnx.Rngs(0)),
        )
    )
    return Weights(*jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), made))


def draw(kind, labels=LABELS, batch_size=5, seed=0, index=None, **change):
    sampler = sampler_of(kind, SETTINGS)
    sampler.keywords.update(change)
    rest = {"batch_size": batch_size, "seed": seed, "index": index}
    return generate_all(sampler, weights(kind), labels, **rest)


def gaussian_velocity(mean, covariance):
    """E[noise - x_0 | x_t] in closed form, x_0 of this Gaussian: all are jointly Gaussian."""
    unit = jnp.eye(len(mean))

    def velocity(x, t):
        of_x = (1 - t) ** 2 * covariance + t**2 * unit
        gain = jnp.linalg.solve(of_x, t * unit - (1 - t) * covariance)
        return (x - (1 - t) * mean[None]) @ gain - mean[None]

    return velocity


MEAN = jnp.array([1.0, -2.0])
ROOT = jnp.array([[1.2, 0.4], [0.4, 0.6]])  # of the covariance


def error(steps, solver):
    """How far the end of paths is from the exact one, which is mean + root · noise."""
    noise = jnp.array([[1.0, -0.5], [0.3, 2.0], [-1.5, 0.2]])
    end = solve(gaussian_velocity(MEAN, ROOT @ ROOT), noise, steps, solver)
    return float(abs(end - (MEAN[None] + noise @ ROOT)).max())


def test_the_flow_of_a_gaussian_gives_its_mean_and_covariance():
    noise = jax.random.normal(jax.random.key(0), (20_000, 2))
    end = np.asarray(solve(gaussian_velocity(MEAN, ROOT @ ROOT), noise, 30, "heun"))
    np.testing.assert_allclose(end.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(end.T), ROOT @ ROOT, atol=0.04)


def test_training_prefers_the_velocity_that_the_solver_takes():
    """The error of a Gaussian's velocity is the variance that is left, and no other's is lower."""
    of_image, of_noise = jax.random.split(jax.random.key(0))
    draw = lambda key: jax.random.normal(key, (20_000, 1, 1, 2))
    x, noise, time = (
        MEAN[None, None, None] + draw(of_image) @ ROOT,
        draw(of_noise),
        jnp.full(20_000, 0.3),
    )
    velocity = gaussian_velocity(MEAN, ROOT @ ROOT)

    def loss(change):
        dit = lambda labels, x, time, key: change(velocity(x.reshape(-1, 2), 0.3)).reshape(x.shape)
        return float(velocity_error(dit, jnp.zeros(len(x), int), x, noise, time).mean())

    covariance, unit = ROOT @ ROOT, jnp.eye(2)
    with_x = 0.3 * unit - 0.7 * covariance
    of_x = 0.7**2 * covariance + 0.3**2 * unit
    left = unit + covariance - with_x @ jnp.linalg.solve(of_x, with_x)
    least = loss(lambda v: v)
    assert least == pytest.approx(float(jnp.trace(left)) / 2, rel=0.03)
    for change in (jnp.negative, lambda v: v + 0.1, lambda v: 0.9 * v, lambda v: 1.1 * v):
        assert loss(change) > least


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    coarse, fine = error(16, solver), error(32, solver)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_greedy_samples_are_what_teacher_forcing_prefers():
    both, labels, keys = weights("raster"), jnp.array([1, 2]), image_keys(0, jnp.arange(2))
    sampler = sampler_of("raster", SamplingConfig(cfg=0.0, top_k=(1,), top_p=(0.0,)))
    images, tokens = sampler(both, labels, keys, None)
    assert images.shape == (2, 12, 12, 3) and tokens.dtype == jnp.int32
    logits = both.transformer(labels, tokens[:, :-1])
    np.testing.assert_array_equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("kind", ["raster", pytest.param("dit", marks=pytest.mark.slow)])
def test_an_image_is_of_its_seed_and_index(kind):
    made = draw(kind)
    assert made.images.shape == (5, 12, 12, 3) and made.images.dtype == np.uint8
    assert (made.tokens is None) == (kind == "dit")
    last = draw(kind, LABELS[3:], index=np.array([3, 4], np.int32))  # padded to 5: one program
    np.testing.assert_array_equal(made.images[3:], last.images)
    assert (made.images != draw(kind, seed=1).images).any((1, 2, 3)).sum() > 2
    other = draw(kind, LABELS[::-1].copy()).images  # the third has the same label
    np.testing.assert_array_equal(made.images[2], other[2])
    assert (made.images != other).any()


@pytest.mark.slow
def test_guidance_is_along_the_difference_of_velocities():
    """With one Euler step the latent is noise - v, and v = (1+s)·cond - s·uncond."""
    both, labels = weights("dit"), jnp.array([1, 2])
    noise = jax.vmap(lambda key: jax.random.normal(key, (3, 3, 8)))(image_keys(0, jnp.arange(2)))
    run = jax.jit(lambda labels: both.transformer(labels, noise, jnp.ones(2)))
    cond, uncond = run(labels), run(jnp.full(2, 3))
    wanted = both.transformer.statistics.denormalize(noise - (2.5 * cond - 1.5 * uncond))
    image = both.tokenizer.decode_latent(wanted)
    found = draw("dit", np.array([1, 2], np.int32), batch_size=2, steps=1, solver="euler").images
    np.testing.assert_allclose(found, (image + 1) * 127.5, atol=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raster", "dit"])
def test_a_mesh_changes_no_image(kind):
    labels = np.resize(LABELS, 8)
    alone = draw(kind, labels, batch_size=8)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        there = draw(kind, labels, batch_size=8)
    np.testing.assert_allclose(np.int32(there.images), np.int32(alone.images), atol=2)


@pytest.mark.parametrize("kind", ["raster", "dit"])
def test_only_var_mixes_codes(kind):
    with pytest.raises(BadInput, match="smooth sampling mixes"):
        sampler_of(kind, SETTINGS, smooth=True)
