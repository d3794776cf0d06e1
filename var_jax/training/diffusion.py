"""Training of the diffusion transformer: it learns the velocity from image to noise.

Rectified flow (Liu et al., arXiv 2209.03003): x_t = (1-t)·x_0 + t·noise, and the loss is the
squared error of noise - x_0. Times are drawn from a logit-normal (Esser et al., arXiv 2403.03206).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Key, UInt8

from var_jax.config import TrainTransformerConfig, TransformerConfig
from var_jax.models import backend
from var_jax.models.dit import Statistics
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, in_parts, reshard
from var_jax.training.state import Batch, Frozen, Learner
from var_jax.training.task import Metrics, Task
from var_jax.training.transformer import transformer_task, withhold_labels

TIMES = (0.125, 0.375, 0.625, 0.875)  # that the validation set is seen at


def diffusion_task(model_config: TransformerConfig, config: TrainTransformerConfig) -> Task:
    """Trains a diffusion transformer, and measures the statistics that normalize its latents.

    A batch holds `label` (B,) and either `image` uint8 (B,H,W,3) or cached `latent` (B,h,w,C).
    `frozen["tokenizer"]` is the tokenizer, which cached latents do not need.
    """

    def loss(dit: Any, batch: Batch, frozen: Frozen, step: Int32[Array, ""], key: Key[Array, ""]):
        drop_label, drop_path, of_time, of_noise = jax.random.split(key, 4)
        latent = latents(batch, frozen, backend.compute_dtype(config.encoder_dtype))
        moments = latent.mean((0, 1, 2)), (latent**2).mean((0, 1, 2))
        statistics = dit.statistics.updated(*moments)
        no_class = model_config.num_classes
        labels = withhold_labels(drop_label, batch["label"], config.label_dropout, no_class)
        time = sample_times(of_time, len(labels), config.time_sampling)
        noise = reshard(jax.random.normal(of_noise, latent.shape), BATCH)
        x = statistics.normalize(latent)
        return velocity_error(dit, labels, x, noise, time, drop_path), (dit.statistics, moments)

    def finish(learner: Learner, aux: tuple[Statistics, tuple]) -> tuple[Learner, Metrics]:
        before, moments = aux  # means over the parts of a batch, which moments allow
        place = lambda dit: dit.with_statistics(before.updated(*moments))
        ema = None if learner.ema is None else place(learner.ema)
        return learner._replace(params=place(learner.params), ema=ema), {}

    def evaluate(dit: Any, batch: Batch, frozen: Frozen) -> Metrics:
        x = dit.statistics.normalize(latents(batch, frozen))
        noise = reshard(jax.random.normal(jax.random.key(0), x.shape), BATCH)

        def error(time: Float[Array, ""]) -> Float[Array, " B"]:
            times = reshard(jnp.full(len(x), time), BATCH)
            return velocity_error(dit, batch["label"], x, noise, times)

        return {"loss": jax.lax.map(error, jnp.array(TIMES)).mean(axis=0)}

    return transformer_task(model_config, config, [loss], evaluate, finish)


def velocity_error(
    dit: Any,
    labels: Array,
    x: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    time: Float[Array, " B"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, " B"]:
    """Mean squared error of the velocity at one time of each image's path; x is normalized."""
    t = time[:, None, None, None]
    error = dit(labels, (1 - t) * x + t * noise, time, key=key) - (noise - x)
    return jnp.mean(error**2, axis=(1, 2, 3))


def sample_times(key: Key[Array, ""], count: int, distribution: str) -> Float[Array, " B"]:
    """Times in (0, 1), logit-normal or uniform."""
    if distribution == "uniform":
        return reshard(jax.random.uniform(key, (count,)), BATCH)
    return reshard(jax.nn.sigmoid(jax.random.normal(key, (count,))), BATCH)


def latents(
    batch: Batch, frozen: Frozen, dtype: DTypeLike = jnp.float32
) -> Float[Array, "B h w C"]:
    """The continuous latents of a batch, before quantization; `dtype` is of the activations."""
    if "latent" in batch:
        return batch["latent"]
    encode = functools.partial(encode_latents, dtype=dtype)
    return data_parallel(encode)(frozen["tokenizer"], batch["image"])


def encode_latents(
    tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "B h w C"]:
    """Images → latents, a few at a time; on one device."""
    encode = lambda image: tokenizer.latent(to_float(image), dtype)
    return in_parts(encode, image, tokenizer.config.images_at_a_time, backend.whole_parts())
