"""Stage 2: the transformer learns to predict each scale from all coarser ones (VAR §3.2)."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import StageConfig, TransformerConfig
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.models.var import Transformer
from var_jax.schedule import slices
from var_jax.sharding.ops import BATCH, in_parts, pin, platform
from var_jax.tools.flops import transformer_flops
from var_jax.training.optimizer import learning_rate, make_optimizer
from var_jax.training.state import (
    Batch,
    Metrics,
    Stage,
    TrainState,
    accumulated,
    apply_gradients,
    average,
    init_state,
)


def transformer_stage(model_config: TransformerConfig, config: StageConfig) -> Stage:
    """The stage that trains the transformer.

    A batch holds `label` (B,), either `image` uint8 (B,H,W,3) or cached `tokens` (B,L) (with `laid`
    (B,L), where the codes to read are not those to predict), and under "tokenizer" the frozen
    tokenizer: an argument of the step, like all it reads.
    """
    optimizer, schedule = make_optimizer(config), learning_rate(config)

    def init(key: Key[Array, ""]) -> TrainState:
        return init_state(Transformer(model_config, rngs=nnx.Rngs(key)), optimizer, config)

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""]):
        key = jax.random.fold_in(key, state.step)
        tokenizer = batch["tokenizer"]

        def loss_fn(model: Transformer, arrays: Batch, key: Key[Array, ""]):
            drop_label, drop_path = jax.random.split(key)
            tokens, inputs = teacher(arrays | {"tokenizer": tokenizer})
            withheld = jax.random.bernoulli(drop_label, config.label_dropout, tokens.shape[:1])
            labels = jnp.where(pin(withheld, BATCH), model_config.num_classes, arrays["label"])
            logits = model(labels, inputs, key=drop_path)
            loss, metrics = judge(logits, tokens, model_config, config.label_smoothing)
            return loss.mean(), jax.tree.map(jnp.mean, metrics)

        arrays = {name: x for name, x in batch.items() if name != "tokenizer"}
        (loss, metrics), gradients = accumulated(
            loss_fn, state.model, arrays, key, config.accumulate
        )
        rate = schedule(state.step)
        norm = optax.tree.norm(gradients)
        state = average(apply_gradients(state, gradients, optimizer), config)
        return state, {"loss": loss, **metrics, "grad_norm": norm, "learning_rate": rate}

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        tokens, inputs = teacher(batch)
        logits = state.best(batch["label"], inputs)
        loss, metrics = judge(logits, tokens, model_config)
        return {"loss": loss, **metrics}

    flops = transformer_flops(model_config)
    return Stage("transformer", config, init, train_step, eval_step, flops)


def teacher(batch: Batch) -> tuple[Int32[Array, "B L"], Float[Array, "B M C"]]:
    """The tokens of a batch, and what the transformer reads to predict them."""
    tokenizer: Tokenizer = batch["tokenizer"]
    tokens = batch.get("tokens")
    if tokens is None:
        image = batch["image"]
        encode = lambda image: tokenizer.encode(to_float(image))
        # Outside a loop XLA's TPU compiler tiles the convolutions badly (benchmarks/aot.md).
        fewest = 2 if platform() == "tpu" else 1
        tokens = in_parts(encode, image, tokenizer.config.images_at_a_time, fewest)
    return tokens, tokenizer.quantizer.teacher_input(batch.get("laid", tokens))


def judge(
    logits: Float[Array, "B L V"],
    tokens: Int32[Array, "B L"],
    config: TransformerConfig,
    smoothing: float = 0.0,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """Cross-entropy of each image, nats a token; without smoothing by scale, and accuracy.

    "last" is the finest scale, as in the paper. Sums over the vocabulary instead of look-ups,
    because it may be split over devices; all in two passes over the logits.
    """
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    here = jnp.arange(logits.shape[-1]) == tokens[..., None]
    hit = jnp.where(here, logits, 0.0).sum(axis=-1)
    total = top + jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1))
    loss, right = total - hit, hit >= top
    metrics = {"accuracy": right.mean(axis=1)}
    for k, s in enumerate(slices(config.patch_nums)):
        name = "last" if k == len(config.patch_nums) - 1 else f"scale{k + 1}"
        metrics[f"loss_{name}"] = loss[:, s].mean(axis=1)
        metrics[f"accuracy_{name}"] = right[:, s].mean(axis=1)
    if smoothing:
        loss = loss + smoothing * (hit - logits.mean(axis=-1))
    return loss.mean(axis=1), metrics
