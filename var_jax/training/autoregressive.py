"""Training of the transformer: it learns to predict each scale from all coarser ones (VAR §3.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TrainTransformerConfig, TransformerConfig
from var_jax.models import var
from var_jax.models.quantizer import Quantizer
from var_jax.models.tokenizer import encode
from var_jax.models.var import Transformer
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, reshard
from var_jax.tools.flops import transformer_flops
from var_jax.training.losses import cross_entropy_metrics
from var_jax.training.optimizer import learning_rate, make_optimizer
from var_jax.training.state import (
    Batch,
    Learner,
    accumulated,
    apply_gradients,
    start_learner,
    update_ema,
)
from var_jax.training.task import Frozen, Metrics, Task, updates


class TransformerState(NamedTuple):
    """The transformer."""

    step: Int32[Array, ""]
    transformer: Learner


def autoregressive_task(model_config: TransformerConfig, config: TrainTransformerConfig) -> Task:
    """Trains the next-scale transformer.

    A batch holds `label` (B,) and either `image` uint8 (B,H,W,3) or cached `tokens` (B,L).
    `frozen["tokenizer"]` is the tokenizer, an argument of the step like all it reads; for cached
    tokens its quantizer, `frozen["quantizer"]`, is enough.
    """
    optimizer, schedule = make_optimizer(config), learning_rate(config)

    def init(key: Key[Array, ""]) -> TransformerState:
        transformer = Transformer(model_config, rngs=nnx.Rngs(key))
        learner = start_learner(transformer, optimizer, config.ema_decay)
        return TransformerState(jnp.zeros((), jnp.int32), learner)

    def train_step(state: TransformerState, batch: Batch, frozen: Frozen, key: Key[Array, ""]):
        def loss_fn(transformer: Transformer, batch: Batch, key: Key[Array, ""]):
            drop_label, drop_path = jax.random.split(key)
            noise = None
            if config.token_noise:
                shape = (len(batch["label"]), model_config.num_tokens)
                codes = (config.token_noise, model_config.vocab_size)
                noise = token_noise(jax.random.fold_in(key, 2), shape, *codes)
            tokens, inputs = targets_and_inputs(batch, frozen, noise)
            withheld = jax.random.bernoulli(drop_label, config.label_dropout, tokens.shape[:1])
            labels = jnp.where(reshard(withheld, BATCH), model_config.num_classes, batch["label"])
            logits = transformer(labels, inputs, key=drop_path)
            loss, metrics = cross_entropy_metrics(
                logits, tokens, model_config.patch_nums, config.label_smoothing
            )
            return loss.mean(), jax.tree.map(jnp.mean, metrics)

        (loss, metrics), gradients = accumulated(
            loss_fn, state.transformer.params, batch, jax.random.fold_in(key, state.step),
            config.accumulate,
        )  # fmt: skip
        learner = apply_gradients(state.transformer, gradients, optimizer)
        learner = update_ema(learner, state.step, config.ema_decay)
        norm, rate = optax.tree.norm(gradients), schedule(updates(state))
        metrics = {"loss": loss, **metrics, "grad_norm": norm, "learning_rate": rate}
        return TransformerState(state.step + 1, learner), metrics

    def eval_step(state: TransformerState, batch: Batch, frozen: Frozen) -> Metrics:
        tokens, inputs = targets_and_inputs(batch, frozen)
        logits = state.transformer.best(batch["label"], inputs)
        loss, metrics = cross_entropy_metrics(logits, tokens, model_config.patch_nums)
        return {"loss": loss, **metrics}

    flops, parts = transformer_flops(model_config), config.accumulate
    return Task("transformer", config, init, train_step, eval_step, var.layout, flops, parts)


def targets_and_inputs(
    batch: Batch, frozen: Frozen, noise: Int32[Array, "B L"] | None = None
) -> tuple[Int32[Array, "B L"], Float[Array, "B M C"]]:
    """The tokens to predict, and what the transformer reads to predict them (teacher forcing)."""
    if "tokens" in batch:
        tokens = used = batch["tokens"]
    else:
        tokens, used = data_parallel(encode)(frozen["tokenizer"], batch["image"], noise)
    quantizer: Quantizer = frozen.get("quantizer") or frozen["tokenizer"].quantizer
    return tokens, data_parallel(Quantizer.teacher_forcing_inputs)(quantizer, used)


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
