"""Copies tokenized ahead, with mistakes for the transformer to make up for."""

import jax
import numpy as np
import pytest
from flax import nnx

from var_jax.config import TokenizerConfig
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.schedule import slices
from var_jax.sharding.mesh import make_mesh, put_whole
from var_jax.training.autoregressive import teacher
from var_jax.training.tokens_ahead import encode_with_mistakes

PATCH_NUMS = (1, 2, 4, 4)


@pytest.fixture(scope="module")
def tokenizer():
    config = TokenizerConfig(
        patch_nums=PATCH_NUMS, vocab_size=32, latent_dim=8, channels=4, channel_mults=(1,),
        num_res_blocks=0, norm_groups=2, patch_size=2, skip=True,
    )  # fmt: skip
    return jax.jit(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)


def coded(tokenizer, images, most):
    encode = jax.jit(encode_with_mistakes, static_argnums=3)
    return jax.device_get(encode(tokenizer, images, jax.random.key(1), most))


def test_mistakes_are_other_pictures_codes_and_what_follows_makes_up_for_them(tokenizer, images):
    tokens, laid = coded(tokenizer, images, 0.8)
    wrong = tokens != laid
    assert 0.25 < wrong[:, 1:].mean() < 0.5  # 0.4 less those that another picture shares
    assert not wrong[:, 0].any()
    quantizer = tokenizer.quantizer
    f, sums = tokenizer.latent(to_float(images)), quantizer.decode(laid)
    for k, s in enumerate(slices(PATCH_NUMS)):
        rest = f - sums[k - 1] if k else f
        nearest = quantizer.nearest(
            quantizer.next_input(rest, k).reshape(16, *[PATCH_NUMS[k]] * 2, -1)
        )
        np.testing.assert_array_equal(tokens[:, s], nearest.reshape(16, -1))
        other = np.roll(tokens[:, s], k, axis=0)
        np.testing.assert_array_equal(laid[:, s], np.where(wrong[:, s], other, tokens[:, s]))


def test_the_transformer_reads_what_was_laid_and_predicts_what_is_right(tokenizer, images):
    tokens, laid = coded(tokenizer, images, 0.8)
    wanted, inputs = teacher({"tokens": tokens, "laid": laid, "tokenizer": tokenizer})
    np.testing.assert_array_equal(wanted, tokens)
    np.testing.assert_array_equal(inputs, tokenizer.quantizer.teacher_input(laid))
    assert abs(inputs - tokenizer.quantizer.teacher_input(tokens)).max() > 0.01


def test_without_mistakes_the_codes_are_the_tokenizers(tokenizer, images):
    tokens, laid = coded(tokenizer, images, 0.0)
    np.testing.assert_array_equal(tokens, tokenizer.encode(to_float(images)))
    np.testing.assert_array_equal(laid, tokens)


def test_mistakes_are_the_same_on_every_mesh(tokenizer, images):
    mesh = make_mesh(4, 2, 1)
    with jax.set_mesh(mesh):
        found = coded(tokenizer, put_whole({"image": images}, mesh)["image"], 0.8)
    np.testing.assert_array_equal(found, coded(tokenizer, images, 0.8))
