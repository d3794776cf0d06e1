"""The models compute what the public PyTorch implementation computes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, models

from var_jax.checkpoints.torch.names import to_torch
from var_jax.models.tokenizer import Tokenizer
from var_jax.sampling.autoregressive import Weights, sample_latent
from var_jax.sampling.generate import image_keys
from var_jax.training.losses import cross_entropy_metrics

pytestmark = pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])]
)


def nhwc(x):
    return jnp.moveaxis(x, -3, -1)


def test_tokenizer(case):
    tokenizer, _, gold = models(case)
    image = nhwc(gold["image"])
    latent = jax.jit(Tokenizer.latent)(tokenizer, image)
    np.testing.assert_allclose(latent, nhwc(gold["latent"]), atol=2e-4)
    code = jax.jit(lambda m, f: m.quantizer.encode(f))(tokenizer, latent)
    np.testing.assert_array_equal(code.idx, gold["tokens"])
    np.testing.assert_allclose(code.sums, nhwc(gold["latent_hat_per_scale"]), atol=2e-4)
    decoded = jax.jit(Tokenizer.decode)(tokenizer, code.idx)
    np.testing.assert_allclose(decoded, nhwc(gold["decoded_tokens"]), atol=2e-4)
    np.testing.assert_allclose(
        jax.jit(Tokenizer.decode_latent)(tokenizer, code.sums[-1]),
        nhwc(gold["reconstruction"]),
        atol=2e-4,
    )
    inputs = jax.jit(lambda m, i: m.quantizer.teacher_forcing_inputs(i))(tokenizer, code.idx)
    np.testing.assert_allclose(inputs, gold["teacher_forcing_input"], atol=2e-4)


def test_quantizer_loss_and_gradient(case):
    tokenizer, _, gold = models(case)

    def loss(f):
        quantized = tokenizer.quantizer(f)
        return quantized.loss.mean(), quantized.f_hat

    latent = nhwc(gold["latent"])
    (value, f_hat), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(latent)
    np.testing.assert_allclose(value, gold["vq_loss"], rtol=1e-5)
    np.testing.assert_allclose(f_hat, nhwc(gold["quantized_straight_through"]), atol=2e-4)
    np.testing.assert_allclose(grad, nhwc(gold["vq_loss_grad_f"]), rtol=1e-3, atol=1e-7)


def test_transformer_logits(case):
    _, transformer, gold = models(case)
    labels, inputs = map(jnp.asarray, (gold["labels"], gold["teacher_forcing_input"]))
    logits = jax.jit(transformer.__call__)(labels, inputs)
    np.testing.assert_allclose(logits, gold["logits"], atol=2e-4)
    no_class = jnp.full_like(labels, transformer.config.num_classes)
    logits = jax.jit(transformer.__call__)(no_class, inputs)
    np.testing.assert_allclose(logits, gold["logits_uncond"], atol=2e-4)


def test_transformer_loss_and_gradients(case):
    _, transformer, gold = models(case)

    labels, inputs = map(jnp.asarray, (gold["labels"], gold["teacher_forcing_input"]))
    tokens = jnp.asarray(gold["tokens"])

    def loss(transformer, smoothing):
        logits = transformer(labels, inputs)
        sides = transformer.config.patch_nums
        return cross_entropy_metrics(logits, tokens, sides, smoothing)[0].mean()

    plain, smooth = (functools.partial(loss, smoothing=amount) for amount in (0.0, 0.1))
    value, grads = jax.jit(jax.value_and_grad(plain))(transformer)
    np.testing.assert_allclose(value, gold["loss_label_smoothing_0.0"], rtol=1e-5)
    value = jax.jit(smooth)(transformer)
    np.testing.assert_allclose(value, gold["loss_label_smoothing_0.1"], rtol=1e-5)
    grads = to_torch(grads)
    assert sorted(grads) == sorted(gold["grad_names"])
    norms = [np.linalg.norm(grads[name]) for name in gold["grad_names"]]
    np.testing.assert_allclose(norms, gold["grad_norms"], rtol=1e-3)
    np.testing.assert_allclose(
        grads["word_embed.weight"], gold["grad_word_embed_weight"], rtol=1e-3, atol=1e-6
    )


def test_greedy_sampling(case):
    tokenizer, transformer, gold = models(case)
    cfg = json.loads(str(gold["config"]))["cfg"]
    keys = image_keys(0, jnp.arange(2))
    weights, how = Weights(tokenizer, transformer), {"cfg": cfg, "top_k": 1, "top_p": 0.0}
    draw = jax.jit(functools.partial(sample_latent, **how))
    f_hat, tokens = draw(weights, jnp.asarray(gold["labels"]), keys)
    image = jax.jit(Tokenizer.decode_latent)(tokenizer, f_hat)
    np.testing.assert_array_equal(tokens, gold["greedy_tokens"])
    np.testing.assert_allclose((image + 1) / 2, nhwc(gold["greedy_image"]), atol=2e-4)
