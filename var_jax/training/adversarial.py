"""The adversarial part of the tokenizer's training: a discriminator that learns beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt8

from var_jax.config import TrainTokenizerConfig
from var_jax.models import backend
from var_jax.models.discriminator import augment, make_discriminator, power_iteration
from var_jax.models.tokenizer import to_float
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, reshard
from var_jax.training.losses import adaptive_weight, discriminator_hinge, generator_loss, lecam
from var_jax.training.optimizer import make_optimizer
from var_jax.training.state import Learner, apply_gradients, start_learner
from var_jax.training.task import Frozen, Metrics

LECAM_DECAY = 0.999  # of the averaged logits

Image = Float[Array, "B H W 3"]


class Adversary(NamedTuple):
    """The discriminator, and moving averages of its logits of images and of reconstructions."""

    discriminator: Learner
    logits: Float[Array, "2"]


def start_adversary(config: TrainTokenizerConfig, key: Key[Array, ""]) -> Adversary | None:
    """The adversary at step 0; None where the config has none."""
    if not config.gan.weight:
        return None
    discriminator = make_discriminator(config.gan, rngs=nnx.Rngs(key))
    optimizer = make_optimizer(config.discriminator())
    return Adversary(start_learner(discriminator, optimizer, 0.0), jnp.zeros(2))


def adversarial_step(
    config: TrainTokenizerConfig,
    adversary: Adversary,
    image: UInt8[Array, "B H W 3"],
    made: Image,
    gradient: Image,
    last_layer: Callable[[Image], Array],
    step: Int32[Array, ""],
    frozen: Frozen,
    key: Key[Array, ""],
) -> tuple[Image, Adversary, Metrics]:
    """What the adversarial loss adds to `gradient`, that of the other losses by the
    reconstructions `made`; the adversary after the step; and figures.

    `last_layer` takes such a gradient to that of the decoder's last convolution. Before `gan.start`
    nothing is added and nothing learned.
    """

    def active():
        return compete(config, adversary, image, made, gradient, last_layer, step, frozen, key)

    def idle():
        _, _, metrics = jax.eval_shape(active)
        nothing = {name: jnp.zeros(()) for name in metrics}
        return jnp.zeros_like(made), adversary, nothing

    if not config.gan.start:
        return active()
    return jax.lax.cond(step >= config.gan.start, active, idle)


def compete(
    config: TrainTokenizerConfig,
    adversary: Adversary,
    image: UInt8[Array, "B H W 3"],
    made: Image,
    gradient: Image,
    last_layer: Callable[[Image], Array],
    step: Int32[Array, ""],
    frozen: Frozen,
    key: Key[Array, ""],
) -> tuple[Image, Adversary, Metrics]:
    """`adversarial_step` after its start: one pass of the discriminator serves both sides."""
    gan, learner = config.gan, adversary.discriminator
    dtype = backend.compute_dtype(config.dtype)
    keys = reshard(jax.random.split(key, len(image)), BATCH)

    def logits(discriminator: Any, made: Image) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        def judge(weights, image, made, keys):
            discriminator, features = weights
            both = jnp.concatenate([to_float(image), made])
            more = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            keys = jnp.concatenate([keys, more])
            if gan.augment:
                both = jax.vmap(augment)(both, keys)
            real, fake = jnp.split(discriminator(both, keys, features, dtype), 2)
            return real, fake

        return data_parallel(judge)((discriminator, frozen.get("dino")), image, made, keys)

    def discriminator_loss(real, fake):
        loss = discriminator_hinge(real, fake)
        if gan.lecam:
            loss += gan.lecam * lecam(real, fake, adversary.logits)
        return loss

    (real, fake), pull_back = jax.vjp(logits, learner.params, made)
    d_loss, cotangents = jax.value_and_grad(discriminator_loss, argnums=(0, 1))(real, fake)
    d_gradients, _ = pull_back(cotangents)
    g_loss, cotangent = jax.value_and_grad(generator_loss)(fake)
    _, g_gradient = pull_back((jnp.zeros_like(real), cotangent))
    weight = adaptive_weight(last_layer(gradient), last_layer(g_gradient))
    weight *= gan.weight * ramp(config, step)
    learner = apply_gradients(learner, d_gradients, make_optimizer(config.discriminator()))
    learner = learner._replace(params=power_iteration(learner.params))
    means = jnp.stack([real.mean(), fake.mean()])
    averages = LECAM_DECAY * adversary.logits + (1 - LECAM_DECAY) * means
    metrics = {
        "generator_loss": g_loss,
        "discriminator_loss": d_loss,
        "discriminator_accuracy": 0.5 * ((real > 0).mean() + (fake < 0).mean()),
        "discriminator_grad_norm": optax.tree.norm(d_gradients),
        "adversarial_weight": weight,
    }
    return weight * g_gradient, Adversary(learner, averages), metrics


def ramp(config: TrainTokenizerConfig, step: Int32[Array, ""]) -> Float[Array, ""]:
    """The share of the adversarial weight at a step; 1 once `gan.ramp` steps are over."""
    done = (step + 1 - config.gan.start).astype(jnp.float32)
    return (done / max(config.gan.ramp, 1)).clip(0, 1)
