"""Sampling from VAR: labels → tokens, scale by scale → images. One jitted program (VAR §3.2)."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped, UInt8

from var_jax.config import SamplingConfig
from var_jax.models.backbone import Cache
from var_jax.models.tokenizer import Tokenizer, decode_latents
from var_jax.sampling import filters
from var_jax.schedule import slices
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, reshape, reshard


class Weights(NamedTuple):
    """What a sampler reads."""

    tokenizer: Tokenizer
    transformer: Any  # of the kind that the sampler is for


class KnownTokens(NamedTuple):
    """Tokens that are kept; the others are sampled. Editing gives those of an image."""

    tokens: Int32[Array, "B L"]
    keep: Bool[Array, "B L"]


class State(NamedTuple):
    """Where sampling is between two scales; with guidance labels, x and cache are of pairs."""

    labels: Int32[Array, " P"]
    x: Float[Array, "P l D"]  # what the transformer reads at the next scale
    cache: Cache
    f_hat: Float[Array, "B h w C"]  # the running sum of the scales so far


@functools.partial(jax.jit, static_argnames=("top_k", "top_p", "smooth"))
def sample(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: Float[Array, ""] | float | None = 1.5,
    top_k: int = 900,
    top_p: float | tuple[float, ...] = 0.96,
    smooth: bool = False,
) -> tuple[UInt8[Array, "B H W 3"], Int32[Array, "B L"]]:
    """Images and their tokens, under guidance `cfg` that rises linearly over the scales.

    A label of num_classes means "no class". Without guidance (None) the work is halved. `top_p` is
    of all scales or of each. `smooth` mixes code vectors instead of picking one: nicer to look at,
    not for metrics.
    """
    how = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "smooth": smooth}
    f_hat, tokens = sample_latent(weights, labels, keys, known, **how)
    return to_images(weights, f_hat), tokens


def to_images(weights: Weights, latent: Float[Array, "B h w C"]) -> UInt8[Array, "B H W 3"]:
    """Latents → images, decoded in the transformer's compute dtype."""
    decode = functools.partial(decode_latents, dtype=weights.transformer.dtype)
    return data_parallel(decode)(weights.tokenizer, latent)


def sample_latent(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: Float[Array, ""] | float | None,
    top_k: int,
    top_p: float | tuple[float, ...],
    smooth: bool = False,
) -> tuple[Float[Array, "B h w C"], Int32[Array, "B L"]]:
    """`sample` up to the quantized latents."""
    num_scales, tokens = len(weights.transformer.config.patch_nums), []
    top_ps = np.broadcast_to(top_p, num_scales).tolist()
    state = begin(weights, labels, guided=cfg is not None)
    for k in range(num_scales):
        how = {"cfg": cfg, "top_k": top_k, "top_p": top_ps[k], "smooth": smooth}
        state, idx_Bl = sample_scale(k, weights, state, keys, known, **how)
        tokens.append(idx_Bl)
    return state.f_hat, jnp.concatenate(tokens, axis=1)


def begin(weights: Weights, labels: Int32[Array, " B"], *, guided: bool) -> State:
    """The state before the first scale."""
    transformer, quantizer = weights.transformer, weights.tokenizer.quantizer
    side, C = transformer.config.patch_nums[-1], quantizer.config.latent_dim
    f_hat = reshard(jnp.zeros((len(labels), side, side, C)), BATCH)
    if guided:
        labels = pairs(labels, jnp.full_like(labels, transformer.config.num_classes))
    cache = transformer.empty_cache(len(labels))
    return State(labels, transformer.embed_start(labels), cache, f_hat)


def sample_scale(
    k: int,
    weights: Weights,
    state: State,
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: Float[Array, ""] | float | None,
    top_k: Int32[Array, ""] | int,
    top_p: Float[Array, ""] | float,
    smooth: bool = False,
) -> tuple[State, Int32[Array, "B l"]]:
    """Samples the tokens of scale k; the state after it."""
    transformer, quantizer = weights.transformer, weights.tokenizer.quantizer
    patch_nums = transformer.config.patch_nums
    here, ratio = slices(patch_nums)[k], k / max(len(patch_nums) - 1, 1)
    logits, cache = transformer.decode(k, state.x, state.labels, state.cache)
    strength = None if cfg is None else cfg * ratio
    logits = choices(logits, strength, top_k, top_p)
    scale_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
    idx_Bl = jax.vmap(jax.random.categorical)(scale_keys, logits).astype(jnp.int32)
    code_BlC = data_parallel(embed)(quantizer, idx_Bl)
    if smooth:
        code_BlC = mix(scale_keys, logits, quantizer.codebook[...], ratio)
    if known is not None:
        keep, kept = known.keep[:, here], known.tokens[:, here]
        idx_Bl = jnp.where(keep, kept, idx_Bl)
        code_BlC = jnp.where(keep[..., None], data_parallel(embed)(quantizer, kept), code_BlC)
    advance = data_parallel(functools.partial(next_scale, k=k))
    f_hat, x_BlC = advance(quantizer, code_BlC, state.f_hat)
    x = state.x
    if k + 1 < len(patch_nums):
        x_BlC = x_BlC if cfg is None else pairs(x_BlC, x_BlC)
        x = transformer.embed_inputs(x_BlC, here.stop)
    return State(state.labels, x, cache, f_hat), idx_Bl


def sample_by_scale(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: float | None,
    top_k: int,
    top_p: float | tuple[float, ...],
) -> Iterator[UInt8[Array, "B H W 3"]]:
    """The images of `sample` after each scale, each as soon as the scale is sampled.

    One program a scale instead of one in all; other values of guidance, top-k and top-p compile
    nothing anew.
    """
    num_scales = len(weights.transformer.config.patch_nums)
    codes = weights.tokenizer.config.vocab_size
    top_ps = np.broadcast_to(top_p, num_scales) + np.equal(top_p, 0)  # 0 and 1: all
    state = _begin(weights, labels, guided=cfg is not None)
    for k in range(num_scales):
        how = {"cfg": cfg, "top_k": np.int32(top_k or codes), "top_p": np.float32(top_ps[k])}
        state, _ = _sample_scale(k, weights, state, keys, known, **how)
        yield _to_images(weights, state.f_hat)


_begin = jax.jit(begin, static_argnames="guided")
_sample_scale = jax.jit(sample_scale, static_argnames="k")
_to_images = jax.jit(to_images)


def choices(
    logits: Float[Array, "P l V"],
    strength: Float[Array, ""] | float | None,
    top_k: Int32[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Float[Array, "B l V"]:
    """Logits that tokens are drawn from: guided, unless `strength` is None, and filtered."""
    if strength is not None:
        logits = filters.guide(reshape(logits, len(logits) // 2, 2, *logits.shape[1:]), strength)
    logits = reshard(logits, BATCH)  # the vocabulary whole on each device
    return filters.top_p(filters.top_k(logits, top_k), top_p)


def pairs(cond: Shaped[Array, "B *rest"], uncond: Shaped[Array, "B *rest"]) -> Array:
    """cond and uncond of each image one after the other, (2B, ...): both on the same device."""
    return reshape(jnp.stack([cond, uncond], axis=1), 2 * len(cond), *cond.shape[1:])


def embed(quantizer, idx_Bl: Int32[Array, "B l"]) -> Float[Array, "B l C"]:
    """Code vectors."""
    return quantizer.codebook[...][idx_Bl]


def next_scale(
    quantizer, code_BlC: Float[Array, "B l C"], f_hat: Float[Array, "B h w C"], *, k: int
) -> tuple[Float[Array, "B h w C"], Float[Array, "B m C"]]:
    """The running sum with scale k in it, and what the transformer reads at the scale after it."""
    B, l, C = code_BlC.shape
    side, last = round(l**0.5), len(quantizer.config.patch_nums) - 1
    f_hat = f_hat + quantizer.contribution(k, code_BlC.reshape(B, side, side, C))
    return f_hat, quantizer.next_input(f_hat, min(k + 1, last))


def mix(
    keys: Key[Array, " B"],
    logits: Float[Array, "B l V"],
    codebook: Float[Array, "V C"],
    ratio: float,
) -> Float[Array, "B l C"]:
    """Gumbel-softmax mixture of code vectors; ratio in [0, 1] is how far along the scales are."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    draw = lambda key, row: jax.random.gumbel(jax.random.fold_in(key, 1), row.shape)
    noise = jax.vmap(draw)(keys, logits)
    weight = jax.nn.softmax((logits * (1 + ratio) + noise) / temperature, axis=-1)
    return jnp.einsum("BlV,VC->BlC", weight, codebook, precision=jax.lax.Precision.HIGHEST)


def sampler(settings: SamplingConfig, smooth: bool = False) -> functools.partial:
    """`sample` with these settings, as `generate` takes it; no guidance is half of the work."""
    return functools.partial(
        sample, cfg=settings.cfg or None, top_k=settings.top_k, top_p=settings.top_p, smooth=smooth
    )
