"""Sampling from VAR: labels → tokens, scale by scale → images. One jitted program (VAR §3.2)."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped, UInt8

from var_jax.config import PER_SCALE, SamplingConfig
from var_jax.models.backbone import Condition
from var_jax.models.cache import Cache
from var_jax.models.tokenizer import Tokenizer, decode_latents
from var_jax.sampling import filters
from var_jax.sampling.filters import Count, Number
from var_jax.sampling.guidance import (
    Guidance,
    guided,
    guided_scales,
    spatial,
    spatial_strength,
)
from var_jax.schedule import shape_of, slices
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, reshape, reshard, split_rows


class Weights(NamedTuple):
    """What a sampler reads."""

    tokenizer: Tokenizer
    transformer: Any  # of the kind that the sampler is for
    refiner: Any = None  # a smaller transformer for the last scales (CoDe)


class KnownTokens(NamedTuple):
    """Tokens that are kept; the others are sampled. Editing gives those of an image."""

    tokens: Int32[Array, "B L"]
    keep: Bool[Array, "B L"]


class State(NamedTuple):
    """Where sampling is between two scales; with guidance labels and so on are of pairs."""

    labels: Int32[Array, " P"]
    condition: Condition
    inputs: tuple[Float[Array, "B l C"], ...]  # of each scale from the second to the next one
    cache: Cache
    f_hat: Float[Array, "B h w C"]  # the running sum of the scales so far
    coarser: Float[Array, "B m V"] | None = None  # logits of the scale before, if SSG wants them


@functools.partial(jax.jit, static_argnames=("guidance", "smooth", "draft_scales"))
def sample(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: Float[Array, ""] | float | None = 1.5,
    top_k: Count | tuple[Count, ...] = 900,
    top_p: Number | tuple[Number | None, ...] | None = 0.96,
    temperature: Number | tuple[Number, ...] = 1.0,
    guidance: Guidance = "ramp",
    smooth: bool = False,
    draft_scales: int | None = None,
) -> tuple[UInt8[Array, "B H W 3"], Int32[Array, "B L"]]:
    """Images and their tokens, under a guidance scale `cfg` that applies as `guidance` says.

    A label of num_classes means "no class". Without a guidance scale (None) the work is halved.
    `top_k`, `top_p` and `temperature` are of all scales or of each; other numbers compile nothing
    anew. `smooth` mixes code vectors instead of picking one: nicer to look at, not for metrics.
    After `draft_scales` scales the refiner takes over.
    """
    settings = {
        "cfg": cfg, "top_k": top_k, "top_p": top_p, "temperature": temperature,
        "guidance": guidance, "smooth": smooth, "draft_scales": draft_scales,
    }  # fmt: skip
    f_hat, tokens = sample_latent(weights, labels, keys, known, **settings)
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
    top_k: Count | tuple[Count, ...],
    top_p: Number | tuple[Number | None, ...] | None,
    temperature: Number | tuple[Number, ...] = 1.0,
    guidance: Guidance = "ramp",
    smooth: bool = False,
    draft_scales: int | None = None,
) -> tuple[Float[Array, "B h w C"], Int32[Array, "B L"]]:
    """`sample` up to the quantized latents.

    With a refiner this is collaborative decoding (CoDe, arXiv 2411.17787): the transformer drafts
    the first `draft_scales` scales; the refiner reads them all at once and samples the others.
    """
    scales, tokens = len(weights.transformer.config.patch_nums), []
    per_scale = zip(*(each_of(scales, x) for x in (top_k, top_p, temperature)), strict=True)
    shared = {"cfg": cfg, "guidance": guidance, "smooth": smooth}
    drafted = draft_scales or scales
    state = begin(weights, labels, guided=cfg is not None, scales=drafted)
    for k, (k_best, p, t) in enumerate(per_scale):
        settings = {"top_k": k_best, "top_p": p, "temperature": t, "anew": k == drafted} | shared
        settings["last"] = k + 1 in (drafted, scales)
        if cfg is not None and k >= guided_scales(guidance, scales):
            state, settings["cfg"] = unguided(state), None
        if k == drafted:
            weights = weights._replace(transformer=weights.refiner)
            state = with_refiner(weights.refiner, state, scales)
        state, idx_Bl = sample_scale(k, weights, state, keys, known, **settings)
        tokens.append(idx_Bl)
    return state.f_hat, jnp.concatenate(tokens, axis=1)


def unguided(state: State) -> State:
    """The state without the "no class" of pairs, where they still are: nothing guides any more."""
    if len(state.labels) == len(state.f_hat):
        return state
    first = lambda x, axis: x if x.shape[axis] == 1 else unpaired(x, axis)[0]
    modulations = jax.tree.map(lambda x: first(x, 1), state.condition.blocks)
    return state._replace(
        labels=first(state.labels, 0),
        condition=Condition(modulations, first(state.condition.head, 0)),
        cache=Cache(*(first(x, 1) for x in state.cache)),
    )


def with_refiner(refiner: Any, state: State, scales: int) -> State:
    """The state for another transformer, which has read nothing yet."""
    cache = refiner.cache_for(len(state.labels), scales)
    return state._replace(condition=refiner.condition(state.labels), cache=cache)


def begin(weights: Weights, labels: Int32[Array, " B"], *, guided: bool, scales: int) -> State:
    """The state before the first of `scales` scales."""
    transformer, quantizer = weights.transformer, weights.tokenizer.quantizer
    latent = *shape_of(transformer.config.patch_nums[-1]), quantizer.config.latent_dim
    f_hat = reshard(jnp.zeros((len(labels), *latent)), BATCH)
    if guided:
        labels = pairs(labels, jnp.full_like(labels, transformer.config.num_classes))
    condition = transformer.condition(labels)
    return State(labels, condition, (), transformer.cache_for(len(labels), scales), f_hat)


def sample_scale(
    k: int,
    weights: Weights,
    state: State,
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: Float[Array, ""] | float | None,
    top_k: Count,
    top_p: Number | None,
    temperature: Number = 1.0,
    guidance: Guidance = "ramp",
    smooth: bool = False,
    anew: bool = False,
    last: bool = False,
) -> tuple[State, Int32[Array, "B l"]]:
    """Samples the tokens of scale k; the state after it.

    `anew`: the cache is empty, and the transformer reads all scales so far. `last`: it predicts no
    further scale.
    """
    quantizer, patch_nums = weights.tokenizer.quantizer, weights.transformer.config.patch_nums
    here, end = slices(patch_nums)[k], len(patch_nums) - 1
    logits, state = predict(k, weights.transformer, state, cfg, guidance, anew, last)
    logits = filtered(logits, top_k, top_p, temperature)
    scale_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
    idx_Bl = jax.vmap(jax.random.categorical)(scale_keys, logits).astype(jnp.int32)
    code_BlC = data_parallel(embed)(quantizer, idx_Bl)
    if smooth:
        code_BlC = mix(scale_keys, logits, quantizer.codebook[...], k / max(end, 1))
    if known is not None:
        keep, kept = known.keep[:, here], known.tokens[:, here]
        idx_Bl = jnp.where(keep, kept, idx_Bl)
        code_BlC = jnp.where(keep[..., None], data_parallel(embed)(quantizer, kept), code_BlC)
    advance = data_parallel(functools.partial(next_scale, k=k))
    f_hat, x_BlC = advance(quantizer, code_BlC, state.f_hat)
    inputs = (*state.inputs, x_BlC) if k < end else state.inputs
    return state._replace(inputs=inputs, f_hat=f_hat), idx_Bl


def predict(
    k: int,
    transformer: Any,
    state: State,
    cfg: Float[Array, ""] | float | None,
    guidance: Guidance,
    anew: bool,
    last: bool,
) -> tuple[Float[Array, "B l V"], State]:
    """Guided logits of scale k; the state with the scale's keys and values in the cache."""
    patch_nums = transformer.config.patch_nums
    x = embed_inputs(transformer, state, slices(patch_nums)[k].stop, anew)
    rest = state.condition, state.cache
    logits, cache = transformer.decode(k, x, *rest, anew=anew, last=last)
    both = (logits, None) if cfg is None else unpaired(logits)
    logits, coarser = guided(guidance, *both, k, len(patch_nums), cfg), None
    if strength := spatial_strength(guidance):
        coarser = logits
        if state.coarser is not None:
            logits = spatial(logits, state.coarser, strength, *patch_nums[k - 1 : k + 1])
    return logits, state._replace(cache=cache, coarser=coarser)


def embed_inputs(transformer: Any, state: State, stop: int, anew: bool) -> Float[Array, "P M D"]:
    """What the transformer reads ahead of the tokens that end at `stop`: all, or of one scale."""
    parts = [transformer.embed_start(state.labels)] if anew or not state.inputs else []
    if state.inputs:
        x = jnp.concatenate(state.inputs, axis=1) if anew else state.inputs[-1]
        start = stop - x.shape[1]
        x = pairs(x, x) if len(state.labels) > len(x) else x
        parts.append(transformer.embed_inputs(x, start))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def sample_by_scale(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: KnownTokens | None = None,
    *,
    cfg: float | None,
    top_k: Count | tuple[Count, ...],
    top_p: Number | tuple[Number | None, ...] | None,
    temperature: Number | tuple[Number, ...] = 1.0,
    guidance: Guidance = "ramp",
) -> Iterator[UInt8[Array, "B H W 3"]]:
    """The images of `sample` after each scale, each as soon as the scale is sampled.

    One program a scale instead of one in all; other values of the guidance scale, top-k, top-p and
    temperature compile nothing anew.
    """
    num_scales = len(weights.transformer.config.patch_nums)
    per_scale = (each_of(num_scales, x) for x in (top_k, top_p, temperature))
    state = _begin(weights, labels, guided=cfg is not None, scales=num_scales)
    for k, (k_best, p, t) in enumerate(zip(*per_scale, strict=True)):
        settings = {"cfg": cfg, "guidance": guidance, "top_k": k_best, "top_p": p, "temperature": t}
        state, _ = _sample_scale(k, weights, state, keys, known, **settings)
        yield _to_images(weights, state.f_hat)


_begin = jax.jit(begin, static_argnames=("guided", "scales"))
_sample_scale = jax.jit(sample_scale, static_argnames=("k", "guidance"))
_to_images = jax.jit(to_images)


def filtered(
    logits: Float[Array, "B l V"],
    top_k: Count,
    top_p: Number | None,
    temperature: Number,
) -> Float[Array, "B l V"]:
    """Logits that tokens are drawn from: of what top-k and top-p leave, over the temperature."""
    logits = reshard(logits, BATCH)  # the vocabulary whole on each device
    return filters.top_p(filters.top_k(logits, top_k), top_p) / temperature


def pairs(cond: Shaped[Array, "B *rest"], uncond: Shaped[Array, "B *rest"]) -> Array:
    """cond and uncond of each image one after the other, (2B, ...): both on the same device."""
    return reshape(jnp.stack([cond, uncond], axis=1), 2 * len(cond), *cond.shape[1:])


def unpaired(x: Shaped[Array, "..."], axis: int = 0) -> tuple[Array, Array]:
    """The inverse of `pairs`, which lie along `axis`."""
    both = split_rows(x, 2, axis)
    cond, uncond = (jax.lax.index_in_dim(both, i, axis + 1, keepdims=False) for i in range(2))
    return cond, uncond


def embed(quantizer, idx_Bl: Int32[Array, "B l"]) -> Float[Array, "B l C"]:
    """Code vectors."""
    return quantizer.codebook[...][idx_Bl]


def next_scale(
    quantizer, code_BlC: Float[Array, "B l C"], f_hat: Float[Array, "B h w C"], *, k: int
) -> tuple[Float[Array, "B h w C"], Float[Array, "B m C"]]:
    """The running sum with scale k in it, and what the transformer reads at the scale after it."""
    last = len(quantizer.config.patch_nums) - 1
    f_hat = f_hat + quantizer.contribution(k, code_BlC)
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
        sample, cfg=settings.cfg or None, guidance=settings.guidance, smooth=smooth,
        **filters_of(settings),
    )  # fmt: skip


def each_of(scales: int, setting: Any) -> tuple:
    """A setting of all scales, or of each, as one of each."""
    values = setting if isinstance(setting, tuple) else (setting,)
    return values * scales if len(values) == 1 else values


def filters_of(settings: SamplingConfig) -> dict[str, tuple]:
    """top-k, top-p and temperature of each scale, None where all is kept: that costs nothing."""
    found = {name: tuple(x or None for x in getattr(settings, name)) for name in PER_SCALE}
    return found | {"top_p": tuple(None if p == 1 else p for p in found["top_p"])}
