"""Training of the tokenizer: it learns to reconstruct images (VAR eq. 5)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from var_jax.config import TokenizerConfig, TrainTokenizerConfig
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.sharding.mesh import replicated
from var_jax.sharding.ops import data_parallel
from var_jax.tools.trees import path_name
from var_jax.training.codebook import CodebookStats, codes_by_scale, init_stats, update_codebook
from var_jax.training.losses import psnr_of_error, squared_error
from var_jax.training.optimizer import learning_rate, make_optimizer, rate_factor
from var_jax.training.state import Batch, Learner, apply_gradients, start_learner, update_ema
from var_jax.training.task import Frozen, Metrics, Task, updates


class TokenizerState(NamedTuple):
    """The tokenizer and the statistics of its codes."""

    step: Int32[Array, ""]
    autoencoder: Learner
    codebook: CodebookStats


def tokenizer_task(model_config: TokenizerConfig, config: TrainTokenizerConfig) -> Task:
    """Trains a tokenizer on batches of `image`, uint8 (B,H,W,3)."""
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    frozen_codes = rate_factor(config, "quantizer.codebook") == 0

    def init(key: Key[Array, ""]) -> TokenizerState:
        tokenizer = make_tokenizer(model_config, rngs=nnx.Rngs(key))
        learner = start_learner(tokenizer, optimizer, config.ema_decay)
        return TokenizerState(
            jnp.zeros((), jnp.int32), learner, init_stats(tokenizer.quantizer.codebook[...])
        )

    def loss_fn(tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"]):
        error, code = data_parallel(reconstruction_error)(tokenizer, image)
        return jnp.mean(error + code.loss), (error, code)

    def train_step(state: TokenizerState, batch: Batch, frozen: Frozen, key: Key[Array, ""]):
        old = state.autoencoder.params
        (loss, (error, code)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            old, batch["image"]
        )
        if config.codebook_decay:  # then the codebook is not the optimizer's
            gradients = with_codebook(gradients, jnp.zeros_like(old.quantizer.codebook[...]))
        learner = apply_gradients(state.autoencoder, gradients, optimizer)
        trained = (old if config.codebook_decay else learner.params).quantizer.codebook[...]
        codebook, stats, dead = update_codebook(
            trained, state.codebook, code.idx, code.residual,
            jax.random.fold_in(key, state.step), config.codebook_decay,
        )  # fmt: skip
        if frozen_codes:  # nor averaged or restarted
            codebook, dead = trained, jnp.zeros_like(dead)
        learner = learner._replace(
            params=with_codebook(learner.params, codebook),
            opt_state=forget_codes(learner.opt_state, dead),
        )
        learner = update_ema(learner, state.step, config.ema_decay)
        if learner.ema is not None:  # an average with a dead code would bring it back
            kept = jnp.where(dead[:, None], codebook, learner.ema.quantizer.codebook[...])
            learner = learner._replace(ema=with_codebook(learner.ema, kept))
        share = stats.hits / stats.hits.sum()
        used = codes_by_scale(code.idx, len(codebook), model_config.patch_nums)
        return TokenizerState(state.step + 1, learner, stats), {
            "loss": loss,
            "psnr": jnp.mean(psnr_of_error(error)),
            "vq_loss": jnp.mean(code.loss),
            "codebook_perplexity": jnp.exp(-jnp.sum(share * jnp.log(share + 1e-12))),
            "codes_restarted": dead.sum(),
            **{f"codes_scale{k + 1}": used[k] for k in range(len(model_config.patch_nums))},
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(updates(state)),
        }

    def eval_step(state: TokenizerState, batch: Batch, frozen: Frozen) -> Metrics:
        return {"psnr": data_parallel(reconstruction_psnr)(state.autoencoder.best, batch["image"])}

    return Task("tokenizer", config, init, train_step, eval_step, replicated)


def reconstruction_error(tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"]):
    """The squared error of each image, and its quantization."""
    target = to_float(image)
    made, code = tokenizer(target)
    return squared_error(made, target), code


def reconstruction_psnr(tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"]) -> Float[Array, " B"]:
    """PSNR in dB of each image, by way of its codes."""
    target = to_float(image)
    return psnr_of_error(squared_error(tokenizer.decode(tokenizer.encode(target)), target))


def with_codebook(tokenizer: Tokenizer, codebook: Float[Array, "V C"]) -> Tokenizer:
    """`tokenizer`, or a tree like it, with other codes."""
    place = lambda path, leaf: codebook if path_name(path) == "quantizer.codebook" else leaf
    return jax.tree_util.tree_map_with_path(place, tokenizer)


def forget_codes(opt_state: Any, dead: Bool[Array, " V"]) -> Any:
    """The optimizer's state without the moments of restarted codes."""

    def forget(path, leaf):
        is_moment = path_name(path).endswith("quantizer.codebook")
        return jnp.where(dead[:, None], 0.0, leaf) if is_moment else leaf

    return jax.tree_util.tree_map_with_path(forget, opt_state)
