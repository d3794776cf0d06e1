"""Oblong schedules: models with turned weights find of turned images what is turned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.models.quantizer import Quantizer
from var_jax.models.resize import downsample, upsample
from var_jax.models.tokenizer import Tokenizer, encode_images
from var_jax.models.var import Transformer
from var_jax.sampling.autoregressive import Weights, sample
from var_jax.sampling.generate import image_keys
from var_jax.schedule import Pattern, lengths, level_ids, num_tokens, shapes, size_of, slices

WIDE = (1, (1, 2), 2, (2, 3), (4, 6))
HIGH = tuple(size_of(shape[::-1]) for shape in shapes(WIDE))
LATENTS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6, 8)), jnp.float32)


def quantizer(patch_nums, turned=False):
    config = TokenizerConfig(patch_nums=patch_nums, vocab_size=64, latent_dim=8, num_phi=0)
    made = jax.jit(lambda: Quantizer(config, rngs=nnx.Rngs(0)))()
    if turned:
        made.phi_kernel = nnx.Param(made.phi_kernel[...].swapaxes(1, 2))
    return made


def turn(x_BL, patch_nums):
    """Tokens or vectors of tokens in the order of the turned scales."""
    parts = [
        x_BL[:, here].reshape(len(x_BL), h, w, *x_BL.shape[2:]).swapaxes(1, 2)
        for (h, w), here in zip(shapes(patch_nums), slices(patch_nums), strict=True)
    ]
    return np.concatenate([part.reshape(len(x_BL), -1, *x_BL.shape[2:]) for part in parts], 1)


def test_a_schedule_of_pairs():
    assert HIGH == (1, (2, 1), 2, (3, 2), (6, 4))
    assert lengths(WIDE) == (1, 2, 4, 6, 24) and num_tokens(WIDE) == 37
    assert slices(WIDE)[3] == slice(7, 13)
    np.testing.assert_array_equal(np.bincount(level_ids(WIDE)), lengths(WIDE))
    assert shapes((1, 2, 4)) == ((1, 1), (2, 2), (4, 4))


@pytest.mark.parametrize("size", [(2, 3), (4, 3), (1, 6)])
def test_resizes_of_turned_images_are_turned(size):
    for resize in (upsample, downsample):
        wide, high = resize(LATENTS, size), resize(LATENTS.swapaxes(1, 2), size[::-1])
        assert wide.shape == (3, *size, 8)
        np.testing.assert_allclose(wide, high.swapaxes(1, 2), atol=1e-5)
    rows = LATENTS.reshape(3, 2, 2, 2, 3, 8).mean((2, 4))
    np.testing.assert_allclose(downsample(LATENTS, 2), rows, atol=1e-6)


@pytest.mark.slow
def test_codes_and_sums_of_turned_latents_are_turned():
    encode, decode = jax.jit(Quantizer.encode), jax.jit(Quantizer.decode)
    read = jax.jit(Quantizer.teacher_forcing_inputs)
    wide, high = quantizer(WIDE), quantizer(HIGH, turned=True)
    code, turned = encode(wide, LATENTS), encode(high, LATENTS.swapaxes(1, 2))
    np.testing.assert_array_equal(turn(np.asarray(code.idx), WIDE), turned.idx)
    np.testing.assert_allclose(turn(np.asarray(code.residual), WIDE), turned.residual, atol=1e-5)
    for ours, other in zip(decode(wide, code.idx), decode(high, turned.idx), strict=True):
        np.testing.assert_allclose(ours, other.swapaxes(1, 2), atol=1e-5)
    np.testing.assert_allclose(decode(wide, code.idx)[-1], code.sums[-1], atol=1e-5)
    inputs = np.asarray(read(wide, code.idx))
    with_first = np.concatenate([inputs[:, :1], inputs], axis=1)
    np.testing.assert_allclose(turn(with_first, WIDE)[:, 1:], read(high, turned.idx), atol=1e-5)


@pytest.mark.slow
def test_inputs_of_an_oblong_schedule_are_the_running_sums():
    model = quantizer(WIDE)
    idx = np.random.default_rng(1).integers(0, 64, (2, num_tokens(WIDE)))
    sums = jax.jit(Quantizer.decode)(model, idx)
    wanted = [model.next_input(f_hat, k + 1) for k, f_hat in enumerate(sums[:-1])]
    found = jax.jit(Quantizer.teacher_forcing_inputs)(model, idx)
    np.testing.assert_allclose(found, np.concatenate(wanted, axis=1), atol=1e-5)


def random_weights(kind, config):
    """A model of random weights, biases and gates too, so that each of them counts."""
    rng = np.random.default_rng(2)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype)
    return jax.tree.map(draw, jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))


def transformers():
    """A wide one and one that is alike but for its turned positions."""
    sizes = dict(vocab_size=64, latent_dim=8, num_classes=3, depth=2, width=32, num_heads=2)
    wide, high = (
        random_weights(Transformer, TransformerConfig(patch_nums=sides, **sizes))
        for sides in (WIDE, HIGH)
    )
    high.pos_embed = nnx.Param(jnp.asarray(turn(wide.pos_embed[...][None], WIDE)[0]))
    return wide, high


def tokenizers():
    """A wide one and one of turned kernels."""
    sizes = dict(vocab_size=64, latent_dim=8, channels=16, channel_mults=(1, 1, 1), norm_groups=4)
    wide, high = (
        random_weights(Tokenizer, TokenizerConfig(patch_nums=sides, num_res_blocks=1, **sizes))
        for sides in (WIDE, HIGH)
    )
    turned = lambda x: x.swapaxes(-4, -3) if x.ndim >= 4 else x  # kernels: (..., h, w, in, out)
    weights = [turned(x) for x in jax.tree.leaves(wide)]
    return wide, jax.tree.unflatten(jax.tree.structure(high), weights)


def test_the_logits_of_turned_tokens_are_turned():
    wide, high = transformers()
    x = np.random.default_rng(3).normal(size=(2, num_tokens(WIDE), 8)).astype(np.float32)
    labels, run = jnp.array([0, 3]), jax.jit(lambda model, labels, x: model(labels, x[:, 1:]))
    ours = np.asarray(run(wide, labels, x))
    assert np.std(ours[:, 1:] - ours[:, :1]) > 0.1
    np.testing.assert_allclose(turn(ours, WIDE), run(high, labels, turn(x, WIDE)), atol=1e-4)


@pytest.mark.slow
def test_the_tokens_of_turned_images_are_turned():
    wide, high = tokenizers()
    images = np.random.default_rng(4).integers(0, 256, (3, 16, 24, 3), np.uint8)
    ours = np.asarray(jax.jit(encode_images)(wide, images))
    assert len(np.unique(ours)) > 8
    theirs = jax.jit(encode_images)(high, images.swapaxes(1, 2))
    np.testing.assert_array_equal(turn(ours, WIDE), theirs)


@pytest.mark.slow
def test_samples_of_turned_models_are_turned():
    """The likeliest tokens and their images, with guidance."""
    labels = jnp.array([0, 1, 2])
    (image, tokens), (turned_image, turned_tokens) = (
        sample(Weights(*models), labels, image_keys(0, labels), cfg=1.5, top_k=1, top_p=0.0)
        for models in zip(tokenizers(), transformers(), strict=True)
    )
    assert len(np.unique(tokens)) > 8 and np.std(image) > 20
    np.testing.assert_array_equal(turn(np.asarray(tokens), WIDE), turned_tokens)
    off = np.asarray(image, int) - np.asarray(turned_image, int).swapaxes(1, 2)
    assert abs(off).max() <= 1


@pytest.mark.parametrize("kind", [TokenizerConfig, TransformerConfig])
def test_pairs_of_equal_sides_are_sides(kind):
    """So the model of such a schedule is the square one."""
    pairs = (1, 1), (2, 2), (2, 3), (4, 4)
    assert kind(patch_nums=pairs) == kind(patch_nums=(1, 2, (2, 3), 4))
    assert Pattern.block_causal(pairs) == Pattern.block_causal((1, 2, (2, 3), 4))
    np.testing.assert_array_equal(downsample(LATENTS, (2, 2)), downsample(LATENTS, 2))
    np.testing.assert_array_equal(upsample(LATENTS, (9, 9)), upsample(LATENTS, 9))
