"""The adversarial loss of the tokenizer, and the discriminator that learns beside it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Key, UInt8

from var_jax.config import GanConfig, TrainTokenizerConfig
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


class Reconstruction(NamedTuple):
    """What the adversarial loss needs of a step: a batch, its reconstructions, two gradients."""

    image: UInt8[Array, "B H W 3"]
    output: Image
    gradient: Image  # of the other losses, by `output`
    last_layer: Callable[[Image], Array]  # from a gradient by `output` to the decoder's last kernel


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
    batch: Reconstruction,
    step: Int32[Array, ""],
    frozen: Frozen,
    key: Key[Array, ""],
) -> tuple[Image, Adversary, Metrics]:
    """The adversarial loss's gradient by the reconstructions, and the next adversary.

    Before `gan.start` the gradient is 0 and nothing is learned.
    """

    def active():
        return compete(config, adversary, batch, step, frozen, key)

    def idle():
        _, _, metrics = jax.eval_shape(active)
        # Of nothing, so that logs leave them out; a norm that is not finite would skip the step.
        nothing = {name: jnp.full((), 0.0 if "norm" in name else jnp.nan) for name in metrics}
        return jnp.zeros_like(batch.output), adversary, nothing

    if not config.gan.start:
        return active()
    return jax.lax.cond(step >= config.gan.start, active, idle)


def compete(
    config: TrainTokenizerConfig,
    adversary: Adversary,
    batch: Reconstruction,
    step: Int32[Array, ""],
    frozen: Frozen,
    key: Key[Array, ""],
) -> tuple[Image, Adversary, Metrics]:
    """`adversarial_step` from `gan.start` on: one forward pass serves both losses."""
    image, output, gradient, last_layer = batch
    learner, dtype = adversary.discriminator, backend.compute_dtype(config.dtype)
    run = data_parallel(partial(logits, config.gan, dtype))
    keys = reshard(jax.random.split(key, len(image)), BATCH)
    (real, fake), pull_back = jax.vjp(
        lambda discriminator, output: run((discriminator, frozen.get("dino")), image, output, keys),
        learner.params, output,
    )  # fmt: skip
    loss_fn = partial(discriminator_loss, config, adversary.logits)
    d_loss, by_logits = jax.value_and_grad(loss_fn, argnums=(0, 1))(real, fake)
    d_gradients, _ = pull_back(by_logits)
    g_loss, by_fake = jax.value_and_grad(generator_loss)(fake)
    _, by_output = pull_back((jnp.zeros_like(real), by_fake))
    weight = adaptive_weight(last_layer(gradient), last_layer(by_output))
    weight *= config.gan.weight * ramp(config, step)
    learner = apply_gradients(learner, d_gradients, make_optimizer(config.discriminator()))
    learner = learner._replace(params=power_iteration(learner.params))
    means = jnp.stack([real.mean(), fake.mean()])
    averages = LECAM_DECAY * adversary.logits + (1 - LECAM_DECAY) * means
    return (
        weight * by_output,
        Adversary(learner, averages),
        {
            "generator_loss": g_loss,
            "discriminator_loss": d_loss,
            "discriminator_accuracy": 0.5 * ((real > 0).mean() + (fake < 0).mean()),
            "discriminator_grad_norm": optax.tree.norm(d_gradients),
            "adversarial_weight": weight,
        },
    )


def logits(
    gan: GanConfig,
    dtype: DTypeLike,
    weights: tuple[Any, Any],
    image: UInt8[Array, "B H W 3"],
    output: Image,
    keys: Key[Array, " B"],
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """The logits of images and of reconstructions, each augmented by itself. Single-device code."""
    discriminator, features = weights
    both = jnp.concatenate([to_float(image), output])
    keys = jax.vmap(lambda key: jax.random.split(key, (2, 2)))(keys)
    keys = jnp.concatenate([keys[:, 0], keys[:, 1]])  # two of an image, two of its reconstruction
    if gan.augment:
        both = jax.vmap(augment)(both, keys[:, 0])
    real, fake = jnp.split(discriminator(both, keys[:, 1], features, dtype), 2)
    return real, fake


def discriminator_loss(
    config: TrainTokenizerConfig,
    averages: Float[Array, "2"],
    real: Float[Array, "B N"],
    fake: Float[Array, "B N"],
) -> Float[Array, ""]:
    """Hinge loss, and LeCAM where it has a weight."""
    loss = discriminator_hinge(real, fake)
    if config.gan.lecam:
        loss += config.gan.lecam * lecam(real, fake, averages)
    return loss


def ramp(config: TrainTokenizerConfig, step: Int32[Array, ""]) -> Float[Array, ""]:
    """The share of the adversarial weight at a step; 1 once `gan.ramp` steps are over."""
    done = (step + 1 - config.gan.start).astype(jnp.float32)
    return (done / max(config.gan.ramp, 1)).clip(0, 1)
