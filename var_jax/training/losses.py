"""Losses and figures of quality, one value an image."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from var_jax.models.var import score_tokens
from var_jax.schedule import slices


def squared_error(a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Mean squared error of each image, for values in [-1, 1]."""
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def psnr_of_error(error: Float[Array, " B"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio in dB; the range is 2, so the peak squared is 4."""
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-8))


def cross_entropy_metrics(
    logits: Float[Array, "B L V"],
    tokens: Int32[Array, "B L"],
    patch_nums: tuple[int, ...],
    smoothing: float = 0.0,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """Cross-entropy of each image in nats a token; without smoothing by scale, and accuracy.

    "last" is the finest scale, as in the paper.
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
    return loss.mean(axis=1), metrics
