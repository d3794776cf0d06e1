"""Oblong schedules: what the quantizer computes of turned latents is turned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from var_jax.config import TokenizerConfig
from var_jax.models.quantizer import Quantizer
from var_jax.models.resize import downsample, upsample
from var_jax.schedule import lengths, level_ids, num_tokens, shapes, size_of, slices

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


def test_inputs_of_an_oblong_schedule_are_the_running_sums():
    model = quantizer(WIDE)
    idx = np.random.default_rng(1).integers(0, 64, (2, num_tokens(WIDE)))
    sums = jax.jit(Quantizer.decode)(model, idx)
    wanted = [model.next_input(f_hat, k + 1) for k, f_hat in enumerate(sums[:-1])]
    found = jax.jit(Quantizer.teacher_forcing_inputs)(model, idx)
    np.testing.assert_allclose(found, np.concatenate(wanted, axis=1), atol=1e-5)
