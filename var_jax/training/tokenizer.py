"""Stage 1: the tokenizer learns to reconstruct (VAR eq. 5; beyond white and black is no error)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from var_jax.config import StageConfig, TokenizerConfig
from var_jax.models.quantizer import Quantized
from var_jax.models.tokenizer import Tokenizer, to_bytes, to_float
from var_jax.sharding.mesh import put_whole, to_host
from var_jax.sharding.ops import path_name, round_up
from var_jax.training.codebook import codes_by_scale, init_stats, update_codebook
from var_jax.training.optimizer import learning_rate, make_optimizer
from var_jax.training.state import (
    Batch,
    Metrics,
    Stage,
    TrainState,
    apply_gradients,
    average,
    init_state,
)


def tokenizer_stage(model_config: TokenizerConfig, config: StageConfig) -> Stage:
    """The stage that trains a tokenizer on batches of `image`, uint8 (B,H,W,3)."""
    optimizer, schedule = make_optimizer(config), learning_rate(config)

    def init(key: Key[Array, ""]) -> TrainState:
        model = Tokenizer(model_config, rngs=nnx.Rngs(key))
        codebook = init_stats(model.quantizer.codebook[...])
        return init_state(model, optimizer, config)._replace(codebook=codebook)

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""]):
        image = to_float(batch["image"])
        (loss, (error, code)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.model, image
        )
        if config.codebook_decay:  # then the codebook is not the optimizer's
            gradients = with_codebook(
                gradients, jnp.zeros_like(state.model.quantizer.codebook[...])
            )
        norm = optax.tree.norm(gradients)
        key = jax.random.fold_in(key, state.step)
        old = state.model.quantizer.codebook[...]
        rate = schedule(state.step)
        state = apply_gradients(state, gradients, optimizer)
        trained = old if config.codebook_decay else state.model.quantizer.codebook[...]
        assert state.codebook is not None
        codebook, stats, restarted = update_codebook(
            trained, state.codebook, code.idx, code.residual, key, config
        )
        state = state._replace(model=with_codebook(state.model, codebook), codebook=stats)
        share = stats.hits / stats.hits.sum()
        used = codes_by_scale(code.idx, len(codebook), model_config.patch_nums)
        return average(state, config), {
            "loss": loss,
            "psnr": jnp.mean(psnr(error)),
            "vq_loss": code.loss,
            "codebook_perplexity": jnp.exp(-jnp.sum(share * jnp.log(share + 1e-12))),
            "codes_restarted": restarted,
            **{f"codes_scale{k + 1}": used[k] for k in range(len(model_config.patch_nums))},
            "grad_norm": norm,
            "learning_rate": rate,
        }

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        image = to_float(batch["image"])
        tokenizer = state.best
        return {"psnr": psnr(squared_error(tokenizer.decode(tokenizer.encode(image)), image))}

    return Stage("tokenizer", config, init, train_step, eval_step)


def loss_fn(
    tokenizer: Tokenizer, image: Float[Array, "B H W 3"]
) -> tuple[Float[Array, ""], tuple[Float[Array, " B"], Quantized]]:
    """Squared error of the reconstruction plus the quantizer's loss.

    Whiter than white is no error, nor blacker than black: shown, it is clipped. So noise of the
    codes has room beyond, and plain backgrounds stay plain.
    """
    made, code = tokenizer(image)
    extreme = jnp.abs(image) > 1 - 1 / 255  # bytes 0 and 255; compiled, they may be off by 1e-7
    beyond = extreme & (made * image > 1)
    error = squared_error(jnp.where(beyond, image, made), image)
    return jnp.mean(error) + code.loss, (error, code)


def with_codebook(tokenizer: Tokenizer, codebook: Float[Array, "V C"]) -> Tokenizer:
    """`tokenizer`, or a tree like it, with other codes."""
    place = lambda path, leaf: codebook if path_name(path) == "quantizer.codebook" else leaf
    return jax.tree_util.tree_map_with_path(place, tokenizer)


def squared_error(a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Mean squared error of each image, for values in [-1, 1]."""
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def psnr(error: Float[Array, " B"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio in dB; the range is 2, so the peak squared is 4."""
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-8))


@jax.jit
def there_and_back(tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Images through the tokenizer and back."""
    return tokenizer.decode(tokenizer.encode(to_float(image)))


def reconstruct(
    tokenizer: Tokenizer, images: UInt8[np.ndarray, "N H W 3"], *, mesh: jax.sharding.Mesh
) -> UInt8[np.ndarray, "N H W 3"]:
    """`there_and_back` of any number of images, a batch at a time, as bytes."""
    size, made = round_up(64), []
    for start in range(0, len(images), size):
        padded = np.resize(images[start : start + size], (size, *images.shape[1:]))
        batch = put_whole({"image": padded}, mesh)["image"]
        made.append(to_bytes(to_host(there_and_back(tokenizer, batch))))
    return np.concatenate(made)[: len(images)]
