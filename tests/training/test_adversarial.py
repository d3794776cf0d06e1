"""The tokenizer's perceptual and adversarial training, and what regularizes it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_loop import train as train_in_loop
from test_tasks import TOKENIZER, TRAIN_TOKENIZER, assert_moved_alike, data, train

from var_jax import BadInput
from var_jax.config import GanConfig, TrainTokenizerConfig
from var_jax.models.discriminator import (
    SpectralConv,
    augment,
    power_iteration,
    select,
)
from var_jax.models.quantizer import Quantizer, neighbours, rotation
from var_jax.tools.trees import path_name
from var_jax.training import adversarial
from var_jax.training.adversarial import logits
from var_jax.training.loop import finite
from var_jax.training.loss_networks import abstract_loss_networks, loss_networks
from var_jax.training.losses import (
    adaptive_weight,
    codebook_entropy,
    discriminator_hinge,
    generator_loss,
    lecam,
)
from var_jax.training.tokenizer import (
    differentiate,
    distances,
    reconstruct,
    regularization,
    tokenizer_task,
    weighted_sum,
    with_codebook,
)

GAN = GanConfig(weight=0.5, layers=2, channels=8, start=2, ramp=2, lecam=0.01, augment=True)
CONFIG = dataclasses.replace(
    TRAIN_TOKENIZER,
    gan=GAN,
    l1_weight=0.2,
    perturbation=0.5,
    entropy_weight=0.1,
    codebook_decay=0.0,
)


@functools.cache
def task_of(config):
    """One task, so one compiled step, for all runs of a config."""
    return tokenizer_task(TOKENIZER, config)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: discriminator_hinge(jnp.array([[2.0, 0.5]]), jnp.array([[-2.0, 0.0]])), 0.375),
        (lambda: generator_loss(jnp.array([[1.0, -4.0]])), 1.5),
        (lambda: lecam(jnp.array([[1.0]]), jnp.array([[-1.0]]), jnp.array([0.5, -0.5])), 4.5),
        (lambda: lecam(jnp.array([[-1.0]]), jnp.array([[1.0]]), jnp.array([0.5, -0.5])), 0.0),
        (lambda: adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 0.5])), 10.0),
        (lambda: adaptive_weight(jnp.array([1.0]), jnp.array([0.0])), 1e4),
        (lambda: adaptive_weight(jnp.array([0.0]), jnp.array([1.0])), 0.015),
    ],
)
def test_losses(loss, expected):
    assert loss() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_gradient_is_of_the_weighted_sum():
    """Of all losses, the adversarial one by the ratio of gradients at the decoder's last kernel."""
    gan = GanConfig(weight=0.5, layers=2, channels=8)
    config = dataclasses.replace(TRAIN_TOKENIZER, gan=gan, l1_weight=0.2)
    state = task_of(config).init(jax.random.key(0))
    side = TOKENIZER.image_size
    image = jax.random.randint(jax.random.key(1), (2, side, side, 3), 0, 256).astype(jnp.uint8)
    step = jax.jit(functools.partial(differentiate, config, TOKENIZER))
    found, _, _, metrics = step(state, image, {}, jax.random.key(2))
    weights, keys = (
        (state.adversary.discriminator.params, None),
        jax.random.split(jax.random.key(3)),
    )

    def reconstruction(tokenizer):
        output, code, _ = reconstruct(config, jnp.float32, tokenizer, image, None, None)
        terms = distances(config, jnp.float32, {}, output, image)
        return jnp.mean(weighted_sum(config, terms) + code.loss)

    def adversarial(tokenizer):
        output, _, _ = reconstruct(config, jnp.float32, tokenizer, image, None, None)
        return generator_loss(logits(gan, jnp.float32, weights, image, output, keys)[1])

    params = state.autoencoder.params
    ours, theirs = (jax.jit(jax.grad(f))(params) for f in (reconstruction, adversarial))
    norm = lambda gradient: jnp.linalg.norm(gradient.decoder.conv_out.kernel[...])
    factor = gan.weight * norm(ours) / norm(theirs)
    np.testing.assert_allclose(metrics["adversarial_weight"], factor, rtol=1e-3)
    wanted = jax.tree.map(lambda a, b: a + factor * b, ours, theirs)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("gan", "sentence"),
    [
        ({}, "needs the weights of DINO ViT-S/16, https://.*gan.dino_file"),
        ({"dino_file": "none.pth"}, "No such file or directory; expected DINO ViT-S/16"),
    ],
)
def test_no_random_features(gan, sentence):
    gan = GanConfig(weight=0.4, discriminator="dino", **gan)
    with pytest.raises(BadInput, match=sentence):
        loss_networks(TrainTokenizerConfig(steps=10, gan=gan))


def test_losses_that_are_off_need_no_networks():
    gan = GanConfig(weight=0.0, discriminator="dino")
    assert loss_networks(TrainTokenizerConfig(steps=10, gan=gan)) == {}
    assert loss_networks(TrainTokenizerConfig(lpips_weight=1.0)) == {}  # trains nothing


@pytest.mark.slow
def test_a_spectral_convolution_gets_the_largest_singular_value():
    discriminator = [SpectralConv(6, 4, 3, rngs=nnx.Rngs(0))]
    first = discriminator[0]
    largest = np.linalg.svd(np.asarray(first.matrix), compute_uv=False)[0]
    assert np.linalg.norm(first.matrix @ first.u[...]) == pytest.approx(largest, rel=0.01)
    for _ in range(100):
        discriminator = power_iteration(discriminator)
    conv = discriminator[0]
    sigma = np.linalg.svd(np.asarray(conv.matrix), compute_uv=False)[0]
    u = conv.u[...]
    assert np.linalg.norm(conv.matrix @ u) == pytest.approx(sigma, rel=1e-4)


def test_select_shifts_and_crops():
    image = jnp.arange(75.0).reshape(5, 5, 3)
    np.testing.assert_array_equal(select(image, jnp.int32(1), jnp.int32(2), 3), image[1:4, 2:5])
    shifted = select(image, jnp.int32(-2), jnp.int32(1), 5)
    np.testing.assert_array_equal(shifted[2:, :4], image[:3, 1:])
    assert (shifted[:2] == 0).all() and (shifted[:, 4] == 0).all()


@pytest.mark.slow
def test_augmentation_differs_by_key_and_has_a_gradient():
    image = jax.random.uniform(jax.random.key(0), (16, 16, 3), minval=-1.0)
    a, b = (augment(image, jax.random.key(i)) for i in (1, 2))
    assert a.shape == image.shape and not np.allclose(a, b)
    gradient = jax.grad(lambda x: augment(x, jax.random.key(1)).sum())(image)
    assert np.isfinite(gradient).all() and (gradient != 0).any()


@pytest.mark.slow
def test_scales_left_out_and_codes_replaced():
    quantizer = Quantizer(TOKENIZER, rngs=nnx.Rngs(0))
    f = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
    plain, sums = quantizer(f), quantizer.encode(f).sums
    fewer = quantizer(f, jnp.array([3, 1]))
    np.testing.assert_allclose(fewer.f_hat, jnp.stack([sums[2][0], sums[0][1]]), atol=1e-5)
    assert float(fewer.loss[0]) == pytest.approx(float(plain.loss[0]), rel=1e-5)
    assert float(fewer.loss[1]) != pytest.approx(float(plain.loss[1]), rel=1e-2)
    ranks = jnp.full(plain.idx.shape, -1)
    np.testing.assert_allclose(quantizer(f, None, ranks).f_hat, plain.f_hat, atol=1e-5)
    nearest = quantizer.perturb(plain.idx, ranks.at[0, 5].set(0))
    assert (nearest != plain.idx).sum() == 1
    codebook = np.asarray(quantizer.codebook[...])
    away = np.linalg.norm(codebook - codebook[plain.idx[0, 5]], axis=1)
    assert nearest[0, 5] == np.argsort(away)[1]


@pytest.mark.slow
def test_an_image_counts_up_to_its_last_scale():
    quantizer = Quantizer(TOKENIZER, rngs=nnx.Rngs(0))
    f = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
    assert quantizer(f).counts is None
    counts = quantizer(f, jnp.array([3, 2])).counts
    np.testing.assert_array_equal(counts.sum(1), [21, 5])
    assert counts[1, :5].all()


def test_each_image_and_each_use_of_chance_has_a_key_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(adversarial, "augment", lambda image, key: seen.append(key) or image)

    def discriminator(both, keys, features, dtype):
        crops.extend(jax.random.key_data(keys).tolist())
        return both[:, 0, 0]

    crops, image = [], jnp.zeros((3, 4, 4, 3), jnp.uint8)
    keys = jax.random.split(jax.random.key(0), 3)
    monkeypatch.setattr(jax, "vmap", lambda f, *axes: lambda *args: jnp.stack([*map(f, *args)]))
    logits(GAN, jnp.float32, (discriminator, None), image, image.astype(jnp.float32), keys)
    used = [tuple(key) for key in (*crops, *(jax.random.key_data(k).tolist() for k in seen))]
    assert len(used) == len(set(used)) == 12


def test_rotation_gives_the_code_and_keeps_the_angle_of_the_gradient():
    f, f_hat, g = jax.random.normal(jax.random.key(0), (3, 5, 4))
    value, pull_back = jax.vjp(lambda f: rotation(f, f_hat), f)
    np.testing.assert_allclose(value, f_hat, rtol=1e-4, atol=1e-5)
    (gradient,) = pull_back(g)
    length = lambda x: np.linalg.norm(x, axis=-1)
    cosine = lambda a, b: (a * b).sum(-1) / length(a) / length(b)
    np.testing.assert_allclose(cosine(gradient, f), cosine(g, f_hat), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(length(gradient) / length(g), length(f_hat) / length(f), rtol=1e-4)


@pytest.mark.slow
def test_kmeans_steps_move_the_codes_only():
    task = tokenizer_task(TOKENIZER, dataclasses.replace(TRAIN_TOKENIZER, kmeans_steps=4))
    start = jax.device_get(jax.jit(task.init)(jax.random.key(0))).autoencoder.params
    (early, state), (_, later) = (train(None, task, steps=steps) for steps in (4, 5))
    assert early[-1, 0] < early[0, 0]
    codes = lambda state: state.autoencoder.params.quantizer.codebook[...]
    assert (codes(state) != start.quantizer.codebook[...]).any()
    same_codes = with_codebook(state.autoencoder.params, jnp.asarray(start.quantizer.codebook[...]))
    chex.assert_trees_all_equal(same_codes, start)
    assert (later.autoencoder.params.analysis[...] != start.analysis[...]).any()


def test_codebook_entropy_is_low_for_sure_and_even_assignments():
    sure, even = jnp.zeros((4, 1)), jnp.eye(4)[:, None]
    assert codebook_entropy(sure, even) == pytest.approx(-np.log(4), abs=1e-4)
    one_code = even[:1].repeat(4, 0)
    assert codebook_entropy(sure, one_code) == pytest.approx(0, abs=1e-4)
    unsure = jnp.full((4, 1), np.log(4)), jnp.full((4, 1, 4), 0.25)
    assert codebook_entropy(*unsure) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_soft_codes_are_posteriors_and_reach_the_latent():
    quantizer = Quantizer(TOKENIZER, rngs=nnx.Rngs(0))
    f = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
    code = quantizer.encode(f)
    soft = quantizer.soft_codes(f, code.residual)
    z, codes = np.asarray(code.residual[0, 0]), np.asarray(quantizer.codebook[...])
    distance = ((z - codes) ** 2).sum(1)  # of the coarsest scale's only token
    p = np.exp(-8 * (distance / distance.min() - 1))
    p /= p.sum()
    np.testing.assert_allclose(soft.mean[0, 0], p, atol=1e-5)
    assert soft.entropy[0, 0] == pytest.approx(-(p * np.log(p + 1e-30)).sum(), rel=1e-3)
    gradient = jax.grad(lambda f: codebook_entropy(*quantizer.soft_codes(f, code.residual)))(f)
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0).all()


@pytest.mark.slow
def test_decoder_only_keeps_encoder_and_codes_to_the_bit():
    config = dataclasses.replace(TRAIN_TOKENIZER, decoder_only=True, weight_decay=0.1)
    task = tokenizer_task(TOKENIZER, config)
    start = jax.device_get(jax.jit(task.init)(jax.random.key(0))).autoencoder
    after = train(None, task, steps=3)[1].autoencoder
    moved = lambda old, new: {
        path_name(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
        )
        if (np.asarray(a) != np.asarray(b)).any()
    }
    for old, new in ((start.params, after.params), (start.ema, after.ema)):
        assert {name.split(".")[0] for name in moved(old, new)} == {
            "decoder", "post_conv", "synthesis"
        }  # fmt: skip


def test_neighbours_are_as_many_as_the_paper_takes():
    assert [neighbours(V) for V in (4096, 64, 2)] == [100, 2, 1]


def test_regularization_is_of_some_images_and_ends():
    config = dataclasses.replace(CONFIG, scale_dropout=0.5, steps=10)
    longer = dataclasses.replace(TOKENIZER, patch_nums=(1, 1, 2, 2, 4))
    draw = lambda step: regularization(config, longer, 400, jnp.int32(step), jax.random.key(0))
    scales, ranks = map(np.asarray, draw(0))
    assert set(np.unique(scales)) == {3, 4, 5} and 0.2 < (scales < 5).mean() < 0.45
    assert (ranks >= 0).any(axis=1).mean() == pytest.approx(0.5, abs=0.1)
    assert ((ranks >= 0).all(axis=1) == (ranks >= 0).any(axis=1)).all()
    assert (np.asarray(draw(6)[1]) == -1).all()
    nothing = regularization(TRAIN_TOKENIZER, longer, 4, jnp.int32(0), jax.random.key(0))
    assert nothing == (None, None)


@pytest.mark.slow
def test_a_step_with_all_losses_keeps_types():
    """Traced only, with DINO and LPIPS of the right shapes."""
    gan = GanConfig(weight=0.4, discriminator="dino", start=2, lecam=0.1, augment=True)
    config = dataclasses.replace(CONFIG, gan=gan, lpips_weight=1.0, dtype="bfloat16")
    tokenizer = dataclasses.replace(TOKENIZER, patch_size=8)
    task, key = tokenizer_task(tokenizer, config), jax.random.key(0)
    state = jax.eval_shape(task.init, key)
    image = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8)
    networks = abstract_loss_networks(config)
    after, metrics = jax.eval_shape(task.train_step, state, {"image": image}, networks, key)
    types = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert types(after) == types(state)
    assert {"lpips_loss", "generator_loss", "discriminator_loss"} <= metrics.keys()


@pytest.mark.slow
def test_heads_on_dino_learn_on_a_mesh():
    gan = GanConfig(weight=0.4, discriminator="dino")
    task = tokenizer_task(TOKENIZER, dataclasses.replace(TRAIN_TOKENIZER, gan=gan))
    rng, networks = np.random.default_rng(0), abstract_loss_networks(task.config)
    dino = jax.tree.map(lambda x: rng.normal(0, 0.05, x.shape).astype(x.dtype), networks["dino"])
    seen, state = train((8, 1, 1), task, steps=1, images=8, dino=dino)
    assert np.isfinite(seen).all()
    before = task.init(jax.random.key(0)).adversary.discriminator.params
    after = state.adversary.discriminator.params
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    moved = [np.isfinite(new).all() and (new != old).any() for old, new in pairs]
    assert np.mean(moved) > 0.9


def test_operations_of_a_step_are_those_of_the_networks_that_learn():
    """The discriminator's from its start on, the encoder's backward unless the decoder is alone."""
    plain = dataclasses.replace(TRAIN_TOKENIZER, gan=GanConfig())
    of_step = lambda config, step=1: task_of(config).image_flops(step)
    assert of_step(CONFIG, GAN.start) == of_step(plain) < of_step(CONFIG, GAN.start + 1)
    alone = of_step(dataclasses.replace(plain, decoder_only=True))
    assert of_step(plain) / 3 < alone < of_step(plain)


@pytest.mark.slow
def test_before_its_start_the_discriminator_changes_nothing():
    plain = dataclasses.replace(CONFIG, gan=GanConfig())
    (_, without), (_, waiting) = (
        train(None, task_of(config), steps=2) for config in (plain, CONFIG)
    )
    chex.assert_trees_all_equal(without.autoencoder, waiting.autoencoder)
    start = jax.device_get(jax.jit(task_of(CONFIG).init)(jax.random.key(0)))
    chex.assert_trees_all_equal(waiting.adversary, start.adversary)


@pytest.mark.slow
def test_logs_have_figures_of_the_discriminator_from_its_start_on():
    """And no step before it is skipped."""
    task, key = task_of(CONFIG), jax.random.key(0)
    state, step, seen = jax.jit(task.init)(key), jax.jit(task.step), []
    for _ in range(GAN.start + 1):
        state, skipped, metrics = step(state, jnp.int32(0), data(), {}, key)
        assert not skipped
        seen.append(finite(jax.device_get(metrics)))
    figures = {"generator_loss", "discriminator_loss", "discriminator_accuracy"}
    assert figures <= seen[-1].keys() and not figures & seen[-2].keys()


@pytest.mark.slow
def test_meshes_agree_on_the_adversarial_step():
    seen, state = train(None, task_of(CONFIG))
    here, there = train((2, 2, 2), task_of(CONFIG))
    np.testing.assert_allclose(here, seen, rtol=1e-4)
    assert_moved_alike(task_of(CONFIG), state, there)


@pytest.mark.slow
def test_resuming_includes_the_discriminator(tmp_path):
    """On a mesh that splits batch and weights."""
    config = dataclasses.replace(CONFIG, steps=9)
    run = functools.partial(
        train_in_loop, config=config, task=task_of(config), mesh_shape=(2, 2, 2)
    )
    whole = run(tmp_path / "a")
    with pytest.raises(OSError):
        run(tmp_path / "b", until=4)
    chex.assert_trees_all_equal(whole, run(tmp_path / "b"))


@pytest.mark.slow
def test_the_discriminator_learns_to_separate():
    """Against a tokenizer that stays as it is, it tells nearly all patches apart."""
    gan = dataclasses.replace(GAN, start=0, ramp=0, augment=False, learning_rate=0.05)
    config = dataclasses.replace(CONFIG, gan=gan, lr_scale=".*=0", steps=150)
    task = task_of(config)
    state, step = jax.jit(task.init)(jax.random.key(0)), jax.jit(task.train_step)
    seen = []
    for _ in range(150):
        state, metrics = step(state, data(), {}, jax.random.key(0))
        seen.append(float(metrics["discriminator_accuracy"]))
        # Weighed by the last layer's gradient, which is there though it is frozen.
        assert metrics["adversarial_weight"] != pytest.approx(0.015 * GAN.weight)
    assert np.mean(seen[-10:]) > 0.9 > np.mean(seen[:3]) + 0.1
