"""Training on tokens: a transformer learns to predict them from those before.

VAR predicts a scale from all coarser ones (VAR §3.2), a raster-scan model one token after another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Key, Shaped

from var_jax.config import TrainTransformerConfig, TransformerConfig
from var_jax.models import backend
from var_jax.models.quantizer import Quantizer
from var_jax.models.tokenizer import encode
from var_jax.models.var import likeliest, score_tokens
from var_jax.schedule import Schedule, Stage, lengths, num_tokens
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, reshard
from var_jax.training.losses import cross_entropy_metrics
from var_jax.training.state import Batch, Frozen
from var_jax.training.task import Metrics, Task
from var_jax.training.transformer import transformer_task, withhold_labels


def autoregressive_task(model_config: TransformerConfig, config: TrainTransformerConfig) -> Task:
    """Trains a next-scale or a raster-scan transformer.

    A batch holds `label` (B,) and either `image` uint8 (B,H,W,3) or cached `tokens` (B,L).
    `frozen["tokenizer"]` is the tokenizer, an argument of the step like all it reads; for cached
    tokens its quantizer, `frozen["quantizer"]`, is enough. Progressive training has a loss for each
    stage.
    """
    patch_nums = model_config.patch_nums

    def loss(
        stage: Stage,
        transformer: Any,
        batch: Batch,
        frozen: Frozen,
        step: Int32[Array, ""],
        key: Key[Array, ""],
    ):
        drop_label, drop_path = jax.random.split(key)
        noise = None
        if config.token_noise:
            shape = (len(batch["label"]), model_config.num_tokens)
            codes = (config.token_noise, model_config.vocab_size)
            noise = token_noise(jax.random.fold_in(key, 2), shape, *codes)
        dtype = backend.compute_dtype(config.encoder_dtype)
        tokens, inputs = targets_and_inputs(transformer, batch, frozen, noise, dtype)
        no_class = model_config.num_classes
        labels = withhold_labels(drop_label, batch["label"], config.label_dropout, no_class)
        weight = None
        if stage.scales < len(patch_nums):
            length = num_tokens(patch_nums[: stage.scales])
            transformer = transformer.first_scales(stage.scales)
            tokens, inputs = tokens[:, :length], inputs[:, : length - 1]
        if stage.warmup:
            weight = token_weights(stage, patch_nums, step)
        logits = transformer(labels, inputs, key=drop_path)
        loss, metrics = cross_entropy_metrics(
            logits, tokens, patch_nums, config.label_smoothing, weight
        )
        if config.student_forcing:
            student = student_loss(transformer, quantizer_of(frozen), labels, logits, drop_path)
            metrics["loss_student"] = student
            loss = loss + config.student_forcing * student
        return loss, jax.tree.map(jnp.mean, metrics)

    def evaluate(transformer: Any, batch: Batch, frozen: Frozen) -> Metrics:
        tokens, inputs = targets_and_inputs(transformer, batch, frozen)
        logits = transformer(batch["label"], inputs)
        loss, metrics = cross_entropy_metrics(logits, tokens, patch_nums)
        return {"loss": loss, **metrics}

    losses = [functools.partial(loss, stage) for stage in config.stages(model_config)]
    return transformer_task(model_config, config, losses, evaluate)


def targets_and_inputs(
    transformer: Any,
    batch: Batch,
    frozen: Frozen,
    noise: Int32[Array, "B L"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Int32[Array, "B L"], Shaped[Array, "B M *C"]]:
    """The tokens to predict, and what the transformer reads to predict them (teacher forcing).

    Images are encoded with activations in `dtype`.
    """
    if "tokens" in batch:
        tokens = used = batch["tokens"]
    else:
        run = data_parallel(functools.partial(encode, dtype=dtype))
        tokens, used = run(frozen["tokenizer"], batch["image"], noise)
    return tokens, transformer.inputs(quantizer_of(frozen), used)


def quantizer_of(frozen: Frozen) -> Quantizer:
    """The quantizer, with the tokenizer or without."""
    return frozen.get("quantizer") or frozen["tokenizer"].quantizer


def student_loss(
    transformer: Any,
    quantizer: Quantizer,
    labels: Int32[Array, " B"],
    logits: Float[Array, "B L V"],
    key: Key[Array, ""],
) -> Float[Array, " B"]:
    """Cross-entropy of a pass that reads what the first pass predicted, to those predictions.

    Sampling reads the model's own tokens, which teacher forcing never shows it. This is student
    forcing (SAR, arXiv 2512.06421); scale 1 reads no tokens, so it does not count. Its authors
    train FlexVAR, whose codes do not make up for wrong ones of coarser scales; ours, residuals, do.
    """
    predicted = likeliest(logits)
    again = transformer(labels, transformer.inputs(quantizer, predicted), key=key)
    target, total, _ = score_tokens(again, predicted)
    return (total - target)[:, 1:].mean(axis=1)


def token_weights(stage: Stage, patch_nums: Schedule, step: Int32[Array, ""]) -> Float[Array, " L"]:
    """How much each token of a stage counts: those of its newest scale the more, the later."""
    *old, new = lengths(patch_nums[: stage.scales])
    done = (step - stage.start + 1).astype(jnp.float32) / stage.warmup
    return jnp.concatenate([jnp.ones(sum(old)), jnp.full(new, jnp.minimum(done, 1.0))])


def token_noise(
    key: Key[Array, ""], shape: tuple[int, int], most: float, vocab_size: int
) -> Int32[Array, "B L"]:
    """Random codes for some tokens, -1 for the others; an image's share is uniform in [0, most].

    Tokens of a scale are sampled without seeing each other, so some will not fit: a model that has
    seen this in training goes on with one image instead of a mixture (self-correction: Infinity,
    arXiv 2412.04431, §3.3).
    """
    of_image, of_token, code = jax.random.split(key, 3)
    share = jax.random.uniform(of_image, (shape[0], 1), maxval=most)
    codes = jax.random.randint(code, shape, 0, vocab_size)
    noise = jnp.where(jax.random.uniform(of_token, shape) < share, codes, -1)
    return reshard(noise, BATCH)
