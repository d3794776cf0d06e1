"""Losses and figures of quality; those of an image are one value an image."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from var_jax.models.var import score_tokens
from var_jax.schedule import Schedule, slices


def squared_error(a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Mean squared error of each image, for values in [-1, 1]."""
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def absolute_error(a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Mean absolute error of each image, for values in [-1, 1]."""
    return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def discriminator_hinge(real: Float[Array, "B N"], fake: Float[Array, "B N"]) -> Float[Array, ""]:
    """The discriminator's loss, 0 where logits are beyond 1 on the right side.

    Lim and Ye, "Geometric GAN", arXiv 1705.02894.
    """
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def generator_loss(fake: Float[Array, "B N"]) -> Float[Array, ""]:
    """The generator's loss beside the hinge: minus the mean logit of what it made.

    Lim and Ye, "Geometric GAN", arXiv 1705.02894.
    """
    return -fake.mean()


def lecam(
    real: Float[Array, "B N"], fake: Float[Array, "B N"], averages: Float[Array, "2"]
) -> Float[Array, ""]:
    """Keeps logits near the moving averages (of real, of fake) of the other kind.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data" (LeCAM),
    arXiv 2104.03310, eq. 4, one-sided as in the authors' code.
    """
    real_average, fake_average = averages
    above, below = jax.nn.relu(real - fake_average), jax.nn.relu(real_average - fake)
    return (above**2).mean() + (below**2).mean()


def adaptive_weight(
    reconstruction: Float[Array, "..."], adversarial: Float[Array, "..."]
) -> Float[Array, ""]:
    """The factor that gives the adversarial loss the gradient norm of the reconstruction loss.

    Both are gradients at the decoder's last convolution: Esser et al., "Taming Transformers",
    arXiv 2012.09841, eq. 7. Clipped to [0.015, 10000], outside of which one loss would vanish.
    """
    ratio = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + 1e-6)
    return ratio.clip(0.015, 1e4)


def codebook_entropy(entropy: Float[Array, "B K"], mean: Float[Array, "B K V"]) -> Float[Array, ""]:
    """Entropy of the assignments to codes less that of their mean, averaged over scales, in nats.

    Low where each assignment is sure and all codes of a scale are used alike: Yu et al.,
    MAGVIT-v2, arXiv 2310.05737, eq. 5, of which `models.quantizer.SoftCodes` has the parts.
    """
    usage = mean.mean(0)
    return entropy.mean() + jnp.sum(usage * jnp.log(usage + 1e-12), axis=-1).mean()


def psnr_of_error(error: Float[Array, " B"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio in dB; the range is 2, so the peak squared is 4."""
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-8))


def cross_entropy_metrics(
    logits: Float[Array, "B L V"],
    tokens: Int32[Array, "B L"],
    patch_nums: Schedule,
    smoothing: float = 0.0,
    weight: Float[Array, " L"] | None = None,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """Cross-entropy of each image in nats a token; without smoothing by scale, and accuracy.

    "last" is the finest scale, as in the paper. Of the first scales alone, figures of the others
    are NaN. Tokens count by `weight`.
    """
    target, total, right = score_tokens(logits, tokens)
    loss = total - target
    metrics = {"accuracy": right.mean(axis=1)}
    for k, s in enumerate(slices(patch_nums)):
        name = "last" if k == len(patch_nums) - 1 else f"scale{k + 1}"
        metrics[f"loss_{name}"] = loss[:, s].mean(axis=1)
        metrics[f"accuracy_{name}"] = right[:, s].mean(axis=1)
    if smoothing:
        loss = loss + smoothing * (target - logits.mean(axis=-1))
    if weight is not None:
        loss = loss * (weight / weight.mean())[None]
    return loss.mean(axis=1), metrics
