"""Training of the tokenizer: it learns to reconstruct images (VAR eq. 5)."""

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from var_jax.config import LEAST_SCALES, GanConfig, TokenizerConfig, TrainTokenizerConfig
from var_jax.models import backend
from var_jax.models.features.lpips import Lpips, lpips
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.quantizer import Quantized, SoftCodes, neighbours
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.schedule import num_tokens, shape_of
from var_jax.sharding.mesh import BATCH, replicated
from var_jax.sharding.ops import data_parallel, reshard
from var_jax.tools.flops import matmul_flops
from var_jax.tools.trees import path_name
from var_jax.training.adversarial import (
    Adversary,
    Reconstruction,
    adversarial_step,
    start_adversary,
)
from var_jax.training.codebook import CodebookStats, codes_by_scale, init_stats, update_codebook
from var_jax.training.loss_networks import loss_flops
from var_jax.training.losses import (
    absolute_error,
    codebook_entropy,
    psnr_of_error,
    squared_error,
)
from var_jax.training.optimizer import held, learning_rate, make_optimizer, rate_factor
from var_jax.training.state import Batch, Learner, apply_gradients, start_learner, update_ema
from var_jax.training.task import Frozen, Metrics, Task, updates

LAST_LAYER = "decoder.conv_out.kernel"
KEPT = r"^(?!decoder\.|post_conv\.|synthesis$)=0"  # by decoder_only: the rule of `lr_scale`
ANNEALED = (0.2, 0.6)  # shares of the steps between which perturbation ends


class TokenizerState(NamedTuple):
    """The tokenizer, the statistics of its codes, the discriminator if there is one."""

    step: Int32[Array, ""]
    autoencoder: Learner
    codebook: CodebookStats
    adversary: Adversary | None = None


def tokenizer_task(model_config: TokenizerConfig, config: TrainTokenizerConfig) -> Task:
    """Trains a tokenizer on batches of `image`, uint8 (B,H,W,3).

    `frozen` holds the networks of the losses that the config has: see `loss_networks`.
    """
    config = with_kept(config)
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    patch_nums = model_config.patch_nums

    def init(key: Key[Array, ""]) -> TokenizerState:
        tokenizer = make_tokenizer(model_config, rngs=nnx.Rngs(key))
        learner = start_learner(tokenizer, optimizer, config.ema_decay)
        stats = init_stats(tokenizer.quantizer.codebook[...])
        adversary = start_adversary(config, jax.random.fold_in(key, 1))
        return TokenizerState(jnp.zeros((), jnp.int32), learner, stats, adversary)

    def train_step(state: TokenizerState, batch: Batch, frozen: Frozen, key: Key[Array, ""]):
        key = jax.random.fold_in(key, state.step)
        of_losses = jax.random.fold_in(key, 3)  # none of the three that restarts split `key` into
        gradients, adversary, code, metrics = differentiate(
            config, model_config, state, batch["image"], frozen, of_losses
        )
        if config.codebook_decay:  # then the codebook is not the optimizer's
            gradients = with_codebook(gradients, jnp.zeros_like(state.codebook.total))
        learner, stats, of_codes = update(config, optimizer, state, gradients, code, key)
        used = codes_by_scale(code.idx, model_config.vocab_size, patch_nums)
        return TokenizerState(state.step + 1, learner, stats, adversary), {
            **metrics,
            **of_codes,
            **{f"codes_scale{k + 1}": used[k] for k in range(len(patch_nums))},
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(updates(state)),
        }

    def eval_step(state: TokenizerState, batch: Batch, frozen: Frozen) -> Metrics:
        weights = state.autoencoder.best, frozen.get("lpips")
        return data_parallel(similarity)(weights, batch["image"])

    flops = functools.cache(functools.partial(step_flops, model_config))
    without = dataclasses.replace(config, gan=GanConfig())
    image_flops = lambda step: flops(config if step > config.gan.start else without)
    return Task("tokenizer", config, init, train_step, eval_step, replicated, image_flops)


def with_kept(config: TrainTokenizerConfig) -> TrainTokenizerConfig:
    """The config, with the rule of `lr_scale` that `decoder_only` stands for."""
    if not config.decoder_only:
        return config
    return dataclasses.replace(config, lr_scale=",".join(filter(None, (KEPT, config.lr_scale))))


def step_flops(model_config: TokenizerConfig, config: TrainTokenizerConfig) -> float:
    """Operations of one image in a training step that are the networks', losses' included."""
    height, width = shape_of(model_config.image_size)
    pixels = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    tokenizer = jax.eval_shape(lambda: make_tokenizer(model_config, rngs=nnx.Rngs(0)))
    forward = partial(reconstruct, TrainTokenizerConfig(), jnp.float32)
    with backend.assume("tpu"):
        losses = loss_flops(config, model_config.image_size)
        products = matmul_flops(forward, tokenizer, pixels, None, None)
        image = jax.ShapeDtypeStruct(pixels.shape, jnp.float32)
        encode = matmul_flops(type(tokenizer).encode, tokenizer, image)
        return 3 * products - (2 * encode if config.decoder_only else 0) + losses


def differentiate(
    config: TrainTokenizerConfig,
    model_config: TokenizerConfig,
    state: TokenizerState,
    image: UInt8[Array, "B H W 3"],
    frozen: Frozen,
    key: Key[Array, ""],
) -> tuple[Tokenizer, Adversary | None, Quantized, Metrics]:
    """Gradients of the tokenizer, the discriminator after the step, the quantization, metrics."""
    of_discriminator, of_quantizer = jax.random.split(key)
    dtype = backend.compute_dtype(config.dtype)
    scales, ranks = regularization(config, model_config, len(image), state.step, of_quantizer)

    def forward(tokenizer: Tokenizer):
        # The last layer's gradient weighs the adversarial loss, frozen or not.
        tokenizer = held(config, tokenizer, LAST_LAYER if config.gan.weight else "")
        run = data_parallel(partial(reconstruct, config, dtype))
        output, code, soft = run(tokenizer, image, scales, ranks)
        if soft is None:
            return (output, code.loss), (code, {})
        entropy = codebook_entropy(*soft)
        return (output, code.loss + config.entropy_weight * entropy), (code, {"entropy": entropy})

    def loss_fn(output: Array, of_codes: Array):
        terms = data_parallel(partial(distances, config, dtype))(frozen, output, image)
        return jnp.mean(weighted_sum(config, terms) + of_codes), terms

    params = state.autoencoder.params
    (output, of_codes), pull_back, (code, entropy) = jax.vjp(forward, params, has_aux=True)
    gradient = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, terms), (by_output, by_codes) = gradient(output, of_codes)
    metrics = {"loss": loss, "psnr": jnp.mean(psnr_of_error(terms.pop("l2")))}
    terms |= {"vq": code.loss, **entropy}
    metrics |= {f"{name}_loss": jnp.mean(term) for name, term in terms.items()}
    adversary = state.adversary
    if adversary is not None:
        # Of the tokenizer's gradients only this one is computed: nothing asks for the others.
        last_layer = lambda g: pull_back((g, by_codes))[0].decoder.conv_out.kernel[...]
        batch = Reconstruction(image, output, by_output, last_layer)
        by_adversary, adversary, more = adversarial_step(
            config, adversary, batch, state.step, frozen, of_discriminator
        )
        by_output, metrics = by_output + by_adversary, metrics | more
    return pull_back((by_output, by_codes))[0], adversary, code, metrics


def update(
    config: TrainTokenizerConfig,
    optimizer: optax.GradientTransformation,
    state: TokenizerState,
    gradients: Tokenizer,
    code: Quantized,
    key: Key[Array, ""],
) -> tuple[Learner, CodebookStats, Metrics]:
    """The tokenizer after a step, the statistics of its codes, metrics of these."""
    old = state.autoencoder.params
    learner = apply_gradients(state.autoencoder, gradients, optimizer)
    if config.kmeans_steps:
        kept = lambda new, old: jnp.where(state.step < config.kmeans_steps, old, new)
        learner = learner._replace(params=jax.tree.map(kept, learner.params, old))
    trained = (old if config.codebook_decay else learner.params).quantizer.codebook[...]
    patch_nums = old.quantizer.config.patch_nums if config.restart_by_scale else ()
    frozen = rate_factor(config, "quantizer.codebook") == 0  # not averaged or restarted either
    codebook, stats, dead, perplexity = update_codebook(
        trained, state.codebook, code.idx, code.residual, key, config.codebook_decay,
        0.0 if frozen else config.codebook_restart, patch_nums, code.counts,
    )  # fmt: skip
    codebook = trained if frozen else codebook
    learner = learner._replace(
        params=with_codebook(learner.params, codebook),
        opt_state=forget_codes(learner.opt_state, dead),
    )
    learner = update_ema(learner, state.step, config.ema_decay)
    if learner.ema is not None:  # an average with a dead code would bring it back
        kept = jnp.where(dead[:, None], codebook, learner.ema.quantizer.codebook[...])
        learner = learner._replace(ema=with_codebook(learner.ema, kept))
    return learner, stats, {"codebook_perplexity": perplexity, "codes_restarted": dead.sum()}


def reconstruct(
    config: TrainTokenizerConfig,
    dtype: DTypeLike,
    tokenizer: Tokenizer,
    image: UInt8[Array, "B H W 3"],
    scales: Int32[Array, " B"] | None,
    ranks: Int32[Array, "B L"] | None,
) -> tuple[Float[Array, "B H W 3"], Quantized, SoftCodes | None]:
    """The reconstructions, their quantization, soft codes if the loss has them."""
    latent, quantizer = tokenizer.latent(to_float(image), dtype), tokenizer.quantizer
    code = quantizer(latent, scales, ranks, config.rotation)
    soft = quantizer.soft_codes(latent, code.residual) if config.entropy_weight else None
    return tokenizer.reconstruct(code.f_hat, dtype), code, soft


def regularization(
    config: TrainTokenizerConfig,
    model_config: TokenizerConfig,
    batch: int,
    step: Int32[Array, ""],
    key: Key[Array, ""],
) -> tuple[Int32[Array, " B"] | None, Int32[Array, "B L"] | None]:
    """Random scale counts and neighbour ranks for a batch, as `Quantizer` takes them; or None.

    Of an image that is perturbed, the share of codes that are replaced falls from 1 to 0 between
    the steps in ANNEALED.
    """
    scales = ranks = None
    K, L = len(model_config.patch_nums), num_tokens(model_config.patch_nums)
    of_scales, count, of_images, of_codes, rank = jax.random.split(key, 5)
    if config.scale_dropout:
        some = jax.random.randint(count, (batch,), LEAST_SCALES, K + 1)
        dropped = jax.random.bernoulli(of_scales, config.scale_dropout, (batch,))
        scales = reshard(jnp.where(dropped, some, K), BATCH)
    if config.perturbation:
        first, last = (share * config.steps for share in ANNEALED)
        share = ((last - step.astype(jnp.float32)) / (last - first)).clip(0, 1)
        images = jax.random.bernoulli(of_images, config.perturbation, (batch, 1))
        replaced = images & (jax.random.uniform(of_codes, (batch, L)) < share)
        near = neighbours(model_config.vocab_size)
        ranks = jnp.where(replaced, jax.random.randint(rank, (batch, L), 0, near), -1)
        ranks = reshard(ranks, BATCH)
    return scales, ranks


def distances(
    config: TrainTokenizerConfig,
    dtype: DTypeLike,
    frozen: Frozen,
    output: Float[Array, "B H W 3"],
    image: UInt8[Array, "B H W 3"],
) -> dict[str, Float[Array, " B"]]:
    """The distances of reconstructions from their images: l2, and the others of the loss."""
    target = to_float(image)
    terms = {"l2": squared_error(output, target)}
    if config.l1_weight:
        terms["l1"] = absolute_error(output, target)
    if config.lpips_weight:
        terms["lpips"] = lpips(frozen["lpips"], target, output, dtype)
    return terms


def weighted_sum(
    config: TrainTokenizerConfig, terms: dict[str, Float[Array, " B"]]
) -> Float[Array, " B"]:
    """The reconstruction loss of each image."""
    weighted = [getattr(config, f"{name}_weight") * term for name, term in terms.items()]
    return jnp.sum(jnp.stack(weighted), axis=0)


def similarity(
    weights: tuple[Tokenizer, Lpips | None], image: UInt8[Array, "B H W 3"]
) -> dict[str, Float[Array, " B"]]:
    """PSNR in dB of each image, by way of its codes; LPIPS too where its weights are given."""
    (tokenizer, perceptual), target = weights, to_float(image)
    output = tokenizer.decode(tokenizer.encode(target))
    figures = {"psnr": psnr_of_error(squared_error(output, target))}
    if perceptual is not None:
        figures["lpips"] = lpips(perceptual, target, output)
    return figures


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
