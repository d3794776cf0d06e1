"""Sampling agrees with the teacher-forced model and depends on (seed, index) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import models

from var_jax.sampling.autoregressive import image_keys, mix, sample
from var_jax.sampling.generate import generate
from var_jax.sharding.mesh import make_mesh

LABELS = np.array([1, 3, 5, 7, 2, 0, 4], np.int32)


def draw(labels=LABELS, batch_size=4, **how):
    tokenizer, transformer, _ = models("base")
    made = list(generate(transformer, tokenizer, labels, batch_size=batch_size, **how))
    return [np.concatenate(part) for part in zip(*made, strict=True)]


def test_cached_decoding_equals_teacher_forcing():
    """Fed its own greedy tokens, the full forward pass prefers each of them."""
    tokenizer, transformer, _ = models("base")
    labels = jnp.array([1, 2, 3])
    _, tokens = sample(
        transformer, tokenizer, labels, image_keys(0, jnp.arange(3)), cfg=0.0, top_k=1, top_p=0.0
    )
    logits = transformer(labels, tokenizer.quantizer.teacher_input(tokens))
    np.testing.assert_array_equal(logits.argmax(-1), tokens)


@pytest.mark.slow
def test_an_image_does_not_depend_on_batch_size_or_devices():
    images, tokens = draw(batch_size=4, seed=3)
    assert images.shape == (7, 64, 64, 3) and tokens.shape == (7, 30)
    np.testing.assert_array_equal(tokens, draw(batch_size=2, seed=3)[1])
    with jax.set_mesh(make_mesh(4, 2, 1)):
        np.testing.assert_array_equal(tokens, draw(batch_size=8, seed=3)[1])
    np.testing.assert_array_equal(tokens[5:], draw(LABELS[5:], seed=3, index=np.arange(5, 7))[1])


def test_seeds_and_labels_matter():
    tokens = draw(seed=0)[1]
    assert (tokens != draw(seed=1)[1]).any(axis=1).all()
    assert (tokens != draw(LABELS[::-1].copy(), seed=0)[1])[[0, 1, 2]].any(axis=1).all()


def test_each_scale_has_its_top_p():
    """Drawn freely at the first two scales and greedily after them, those settle the rest."""
    greedy = [1e-9] * (len(models("base")[1].config.patch_nums) - 2)
    tokens = draw(np.full(16, 3), top_p=(1.0, 1.0, *greedy), top_k=0, cfg=None)[1]
    assert len(np.unique(tokens[:, :5], axis=0)) == len(np.unique(tokens, axis=0)) > 1


def test_smooth_mixes_codes():
    plain, mixed = draw(seed=0)[0], draw(seed=0, smooth=True)[0]
    assert mixed.shape == plain.shape and (mixed != plain).any()


def test_mixtures_become_draws_from_sharper_logits():
    """At the first scale a mixture; at the last nearly one code, drawn from twice the logits."""
    share = np.array([0.5, 0.3, 0.2])
    logits = jnp.broadcast_to(jnp.log(share), (4000, 1, 3))
    first, last = (mix(image_keys(0, jnp.arange(4000)), logits, jnp.eye(3), r) for r in (0.0, 1.0))
    assert np.median(first.max(-1)) < 0.99 < np.median(last.max(-1))
    drawn = np.bincount(last[:, 0].argmax(-1), minlength=3) / 4000
    np.testing.assert_allclose(drawn, share**2 / (share**2).sum(), atol=0.03)
