"""Sampling agrees with the teacher-forced model and depends on (seed, index) alone."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import models

from var_jax.config import TransformerConfig
from var_jax.models import backbone
from var_jax.models.tokenizer import decode_tokens
from var_jax.sampling.autoregressive import (
    Weights,
    filtered,
    mix,
    sample,
    sample_by_scale,
    sample_latent,
)
from var_jax.sampling.exports import build
from var_jax.sampling.generate import generate_all, image_keys
from var_jax.sampling.guidance import guide
from var_jax.schedule import slices
from var_jax.sharding.mesh import make_mesh
from var_jax.tools.flops import matmul_flops

LABELS = np.array([1, 3, 5, 7, 2, 0, 4], np.int32)
LABELS_8 = np.arange(8, dtype=np.int32)


def draw(labels=LABELS, batch_size=4, seed=0, index=None, known=None, **how):
    """Images and tokens."""
    weights = Weights(*models("base")[:2])
    sampler = functools.partial(sample, **how)
    rest = {"batch_size": batch_size, "seed": seed, "index": index, "known": known}
    generated = generate_all(sampler, weights, labels, **rest)
    assert generated.rows.tolist() == list(range(len(labels)))
    return generated.images, generated.tokens


PROGRAMS = [
    pytest.param(
        window, attention, marks=[] if (window, attention) == (2, "auto") else pytest.mark.slow
    )
    for window in (0, 1, 2, 3)
    for attention in ("auto", "kernel")
]


def with_window(window, attention="auto"):
    """The "base" model whose tokens see so many scales."""
    transformer = jax.tree.map(lambda x: x, models("base")[1])
    config = dataclasses.replace(transformer.config, window=window, attention=attention)
    transformer.config = config
    return transformer


@pytest.mark.parametrize(("window", "attention"), PROGRAMS)
def test_cached_decoding_equals_teacher_forcing(window, attention):
    """Fed its own greedy tokens, the full forward pass prefers each of them."""
    tokenizer, transformer = models("base")[0], with_window(window, attention)
    labels = jnp.array([1, 2, 3])
    weights, keys = Weights(tokenizer, transformer), image_keys(0, jnp.arange(3))
    _, tokens = sample(weights, labels, keys, cfg=0.0, top_k=1, top_p=0.0)
    logits = transformer(labels, tokenizer.quantizer.teacher_forcing_inputs(tokens))
    np.testing.assert_array_equal(logits.argmax(-1), tokens)


def test_a_window_hides_coarser_scales():
    """Logits are those of all scales until one lies outside, and differ from there on."""
    labels, read = jnp.array([1]), jnp.ones((1, 29, models("base")[0].config.latent_dim))
    all_scales = with_window(0)(labels, read)
    for window, first in ((1, 1), (2, 5), (3, 14)):
        logits = with_window(window)(labels, read)
        np.testing.assert_allclose(logits[:, :first], all_scales[:, :first], atol=1e-5)
        assert (abs(logits - all_scales)[:, first:].max(-1) > 1e-4).all()
    np.testing.assert_allclose(with_window(4)(labels, read), all_scales, atol=1e-5)


def large_scales(window, attention):
    """A model at random of 1, 16, 25 and 36 tokens; what it reads; its logits of all scales."""
    sizes = dict(patch_nums=(1, 4, 5, 6), depth=2, width=128, num_heads=2, vocab_size=32)
    config = TransformerConfig(
        **sizes, latent_dim=8, num_classes=4, window=window, attention=attention, dtype="float32"
    )
    rng = np.random.default_rng(0)
    drawn = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    model, labels = jax.tree.map(drawn, build(config)), jnp.array([1, 3])
    read = jnp.asarray(rng.normal(size=(2, config.num_tokens - 1, 8)), jnp.float32)
    embedded = [model.embed_start(labels), model.embed_inputs(read)]
    return model, labels, jnp.concatenate(embedded, axis=1), model(labels, read)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "attention"), PROGRAMS)
def test_cached_logits_are_those_of_all_scales_at_once(window, attention):
    """From the first scale on, and from any later one that reads all before it anew."""
    model, labels, x, logits = large_scales(window, attention)
    places, condition = slices(model.config.patch_nums), model.condition(labels)
    for first in range(4):
        cache = model.cache_for(2, 4)
        for k in range(first, 4):
            anew = k == first
            here = x[:, : places[k].stop] if anew else x[:, places[k]]
            made, cache = model.decode(k, here, condition, cache, anew=anew)
            np.testing.assert_allclose(made, logits[:, places[k]], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 2])
def test_cached_attention_of_cudnn(window, monkeypatch, cudnn_in_xla):
    """With lengths that are odd, which it does not take; the first of them are few."""
    monkeypatch.setattr(backbone, "choose", lambda *_: "cudnn")
    model, labels, x, logits = large_scales(window, "auto")
    places, condition = slices(model.config.patch_nums), model.condition(labels)
    cache = model.cache_for(2, 4)
    for k, place in enumerate(places):
        made, cache = model.decode(k, x[:, place], condition, cache)
        np.testing.assert_allclose(made, logits[:, place], atol=2e-3)
    assert {(16, 18), (36, 78 if not window else 62)} <= {*cudnn_in_xla}


def test_a_model_that_cudnn_trained_runs_elsewhere():
    there, here = (with_window(0, attention) for attention in ("cudnn", "blocks"))
    x = jnp.zeros((2, 29, here.config.latent_dim))
    logits = [jax.jit(type(here).__call__)(model, jnp.zeros(2, int), x) for model in (there, here)]
    np.testing.assert_array_equal(*logits)


def test_the_layers_do_not_copy_the_cache():
    model, labels, x, _ = large_scales(0, "auto")
    cache, here = model.cache_for(2, 4), x[:, slices(model.config.patch_nums)[2]]
    step = jax.jit(lambda *rest: model.decode(2, *rest), donate_argnums=2)
    text = step.lower(here, model.condition(labels), cache).compile().as_text()
    whole = "f32[" + ",".join(map(str, cache.k.shape)) + "]"
    assert whole in text
    assert not [line for line in text.splitlines() if f"= {whole}" in line and " copy(" in line]


@pytest.mark.slow
def test_a_window_in_all_programs():
    """Scale by scale, on a mesh, and behind a draft: the tokens are the same."""
    tokenizer, transformer = models("base")[0], with_window(2)
    weights, how = Weights(tokenizer, transformer), {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    sampler, keys = functools.partial(sample, **how), image_keys(0, jnp.arange(8))
    draw_all = lambda: generate_all(sampler, weights, LABELS_8, batch_size=8).tokens
    images, tokens = sample(weights, jnp.arange(8), keys, **how)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        np.testing.assert_array_equal(draw_all(), tokens)
    *_, last = sample_by_scale(weights, jnp.arange(8), keys, **how)
    np.testing.assert_allclose(np.int32(last), np.int32(images), atol=1)
    for draft_scales in (1, 2, 3):
        draft = functools.partial(sample_latent, draft_scales=draft_scales, **how)
        again = jax.jit(draft)(weights._replace(refiner=transformer), jnp.arange(8), keys)[1]
        np.testing.assert_array_equal(again, tokens)


@pytest.mark.slow
def test_an_image_does_not_depend_on_batch_size_or_devices():
    images, tokens = draw(batch_size=4, seed=3)
    assert images.shape == (7, 64, 64, 3) and tokens.shape == (7, 30)
    np.testing.assert_array_equal(tokens, draw(batch_size=2, seed=3)[1])
    with jax.set_mesh(make_mesh(4, 2, 1)):
        np.testing.assert_array_equal(tokens, draw(batch_size=8, seed=3)[1])
    np.testing.assert_array_equal(
        tokens[5:], draw(LABELS[5:], seed=3, index=np.arange(5, 7, dtype=np.int32))[1]
    )


VARIED = {
    "top_k": (0, 9, 5, 9), "top_p": (0.9, 0.5, 0.9, 0.5), "temperature": (1.5, 1.0, 0.7, 1.1),
    "guidance": "ssg=0.5",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", [VARIED, {"top_k": 0, "top_p": 0.0}])
def test_scale_by_scale_ends_in_the_sample(settings):
    weights, labels = Weights(*models("base")[:2]), jnp.asarray(LABELS[:2])
    keys, how = image_keys(0, jnp.arange(2)), {"cfg": 2.0} | settings
    stages = list(sample_by_scale(weights, labels, keys, **how))
    assert len(stages) == 4 and (stages[0] != stages[-1]).any()
    wanted = draw(LABELS[:2], batch_size=2, **how)[0]
    np.testing.assert_allclose(np.int32(stages[-1]), np.int32(wanted), atol=1)


@pytest.mark.slow
@pytest.mark.parametrize("sides", [None, (2, 2, 2)])
def test_scales_after_an_interval_take_half_of_the_work_and_the_same_tokens(sides):
    """A function in its place, which may read both halves at any scale, keeps both."""
    same = lambda cond, uncond, k: guide(cond, uncond, 2.0 * (k == 1))
    with contextlib.nullcontext() if sides is None else jax.set_mesh(make_mesh(*sides)):
        tokens = draw(LABELS_8, 8, cfg=2.0, guidance="interval=2-2")[1]
        np.testing.assert_array_equal(tokens, draw(LABELS_8, 8, cfg=2.0, guidance=same)[1])
        assert (tokens != draw(LABELS_8, 8, cfg=None)[1]).any()
    if sides is None:
        weights, keys = Weights(*models("base")[:2]), image_keys(0, jnp.asarray(LABELS_8))
        settings = {"cfg": 2.0, "top_k": 0, "top_p": 0.0}
        of = lambda name: functools.partial(sample_latent, guidance=name, **settings)
        work = {
            guidance: matmul_flops(of(guidance), weights, LABELS_8, keys)
            for guidance in ("interval=2-2", "interval=1-4")
        }
        assert work["interval=2-2"] < 0.7 * work["interval=1-4"]


@pytest.mark.slow
def test_seeds_and_labels_matter():
    tokens = draw(seed=0)[1]
    assert (tokens != draw(seed=1)[1]).any(axis=1).all()
    assert (tokens != draw(LABELS[::-1].copy(), seed=0)[1])[[0, 1, 2]].any(axis=1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": (1.0, 1.0, 1e-9, 1e-9), "top_k": 0},
        {"top_p": 0.0, "top_k": (0, 0, 1, 1)},
        {"top_p": 0.0, "top_k": 0, "temperature": (1.0, 1.0, 0.01, 0.01)},
    ],
)
def test_each_scale_has_its_settings(settings):
    """Sampled freely at the first two scales and greedily after them, those settle the rest."""
    tokens = draw(np.full(16, 3, np.int32), cfg=None, **settings)[1]
    assert len(np.unique(tokens[:, :5], axis=0)) == len(np.unique(tokens, axis=0)) > 1


def test_temperature_sharpens_what_top_k_leaves():
    logits = jnp.log(jnp.array([[[0.1, 0.5, 0.2, 0.2]]]))
    share = jax.nn.softmax(filtered(logits, 3, 0.0, 0.5))[0, 0]
    np.testing.assert_allclose(share, np.array([0, 25, 4, 4]) / 33, atol=1e-6)


def drafted(refiner, draft_scales, labels, **how):
    """Tokens of collaborative decoding by the "base" model and another."""
    tokenizer, transformer, _ = models("base")
    draw = functools.partial(sample_latent, draft_scales=draft_scales, **how)
    weights, keys = Weights(tokenizer, transformer, refiner), image_keys(0, jnp.arange(len(labels)))
    return jax.jit(draw)(weights, jnp.asarray(labels), keys)[1]


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_refiner_predicts_the_last_scales_from_the_draft(window):
    """Greedily, the token of each scale is the likeliest of the model that is to sample it."""
    tokenizer, transformer, _ = models("base")
    config = dataclasses.replace(transformer.config, depth=1, width=64, num_heads=2, window=window)
    rng = np.random.default_rng(0)
    drawn = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    refiner = jax.tree.map(drawn, build(config))
    labels = jnp.array([1, 2, 3])
    tokens = drafted(refiner, 2, labels, cfg=None, top_k=1, top_p=0.0)
    inputs, first = tokenizer.quantizer.teacher_forcing_inputs(tokens), 5  # tokens of two scales
    predicted = [model(labels, inputs).argmax(-1) for model in (transformer, refiner)]
    np.testing.assert_array_equal(tokens[:, :first], predicted[0][:, :first])
    np.testing.assert_array_equal(tokens[:, first:], predicted[1][:, first:])
    assert (predicted[0] != predicted[1])[:, first:].any()


@pytest.mark.slow
@pytest.mark.parametrize("draft_scales", [1, 2, 3, 4])
def test_a_refiner_that_is_the_same_model_changes_nothing(draft_scales):
    transformer, how = models("base")[1], {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    refiner = transformer if draft_scales < 4 else None  # it has nothing left to do
    tokens = drafted(refiner, draft_scales, LABELS[:4], **how)
    np.testing.assert_array_equal(tokens, draw()[1][:4])


@pytest.mark.slow
def test_a_refiner_on_a_mesh():
    transformer, how = models("base")[1], {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    weights = Weights(*models("base")[:2], transformer)
    sampler = functools.partial(sample, draft_scales=2, guidance="ssg=0.2", **how)
    draw_all = lambda: generate_all(sampler, weights, LABELS, batch_size=8).tokens
    alone = draw_all()
    with jax.set_mesh(make_mesh(2, 2, 2)):
        np.testing.assert_array_equal(draw_all(), alone)


@pytest.mark.slow
def test_smooth_mixes_codes():
    plain, mixed = draw(seed=0)[0], draw(seed=0, smooth=True)[0]
    assert mixed.shape == plain.shape and (mixed != plain).any()


def test_mixtures_become_samples_of_sharper_logits():
    """At the first scale a mixture; at the last nearly one code, sampled from twice the logits."""
    share = np.array([0.5, 0.3, 0.2])
    logits = jnp.broadcast_to(jnp.log(share), (4000, 1, 3))
    first, last = (mix(image_keys(0, jnp.arange(4000)), logits, jnp.eye(3), r) for r in (0.0, 1.0))
    assert np.median(first.max(-1)) < 0.99 < np.median(last.max(-1))
    found = np.bincount(last[:, 0].argmax(-1), minlength=3) / 4000
    np.testing.assert_allclose(found, share**2 / (share**2).sum(), atol=0.03)


def test_a_batch_is_rounded_up_to_the_mesh_and_no_image_is_sampled_twice():
    """80 images in batches of 4 on 8 devices are 10 programs of 8."""
    calls = []

    def sampler(weights, labels, keys, known):
        calls.append(len(labels))
        images = jnp.zeros(
            (len(labels), 2, 2, 3), jnp.uint8, out_sharding=jax.typeof(labels).sharding
        )
        return images, None

    with jax.set_mesh(make_mesh(8, 1, 1)):
        generated = generate_all(sampler, None, np.zeros(80, np.int32), batch_size=4)
    assert calls == [8] * 10 and len(generated.images) == 80 and generated.tokens is None


@pytest.mark.slow
def test_bfloat16_samples_agree_with_float32():
    """Greedily, most tokens are the same; where two codes are as likely they may differ.

    Images are decoded in its dtype too: with random weights a few grey levels off.
    """
    tokenizer, transformer, _ = models("base")
    half = nnx.clone(transformer)
    half.config = dataclasses.replace(transformer.config, dtype="bfloat16")
    labels, keys = jnp.asarray(LABELS), image_keys(0, jnp.arange(len(LABELS)))
    how = {"cfg": 1.5, "top_k": 1, "top_p": 0.0}
    (_, exact), (images, tokens) = (
        sample(Weights(tokenizer, t), labels, keys, **how) for t in (transformer, half)
    )
    assert (exact == tokens)[:, :5].mean() > 0.9
    difference = np.abs(images.astype(int) - decode_tokens(tokenizer, tokens).astype(int))
    assert 0 < difference.mean() < 3
