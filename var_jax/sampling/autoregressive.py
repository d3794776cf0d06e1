"""Sampling from VAR: labels → tokens, scale by scale → images. One jitted program (VAR §3.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped, UInt8

from var_jax.config import SamplingConfig
from var_jax.models.tokenizer import Tokenizer, decode_latents
from var_jax.models.var import Transformer
from var_jax.sampling import filters
from var_jax.schedule import slices
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import data_parallel, reshape, reshard


class Weights(NamedTuple):
    """What a sampler reads."""

    tokenizer: Tokenizer
    transformer: Transformer


class KnownTokens(NamedTuple):
    """Tokens that are kept; the others are sampled. Editing gives those of an image."""

    tokens: Int32[Array, "B L"]
    keep: Bool[Array, "B L"]


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
    return data_parallel(decode_latents)(weights.tokenizer, f_hat), tokens


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
    transformer, quantizer = weights.transformer, weights.tokenizer.quantizer
    patch_nums, num_classes = transformer.config.patch_nums, transformer.config.num_classes
    top_ps = np.broadcast_to(top_p, len(patch_nums)).tolist()
    guided = cfg is not None
    labels = pairs(labels, jnp.full_like(labels, num_classes)) if guided else labels
    cache = transformer.empty_cache(len(labels))
    x, tokens = transformer.embed_start(labels), []
    side, C = patch_nums[-1], quantizer.config.latent_dim
    f_hat = reshard(jnp.zeros((len(keys), side, side, C)), BATCH)
    for k, here in enumerate(slices(patch_nums)):
        ratio = k / max(len(patch_nums) - 1, 1)
        logits, cache = transformer.decode(k, x, labels, cache)
        if guided:
            logits = filters.guide(reshape(logits, len(keys), 2, *logits.shape[1:]), cfg * ratio)
        logits = reshard(logits, BATCH)  # the vocabulary whole on each device
        logits = filters.top_p(filters.top_k(logits, top_k), top_ps[k])
        scale_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        idx_Bl = jax.vmap(jax.random.categorical)(scale_keys, logits).astype(jnp.int32)
        code_BlC = data_parallel(embed)(quantizer, idx_Bl)
        if smooth:
            code_BlC = mix(scale_keys, logits, quantizer.codebook[...], ratio)
        if known is not None:
            keep, kept = known.keep[:, here], known.tokens[:, here]
            idx_Bl = jnp.where(keep, kept, idx_Bl)
            code_BlC = jnp.where(keep[..., None], data_parallel(embed)(quantizer, kept), code_BlC)
        tokens.append(idx_Bl)
        advance = data_parallel(functools.partial(next_scale, k=k))
        f_hat, x_BlC = advance(quantizer, code_BlC, f_hat)
        if k + 1 < len(patch_nums):
            x = transformer.embed_inputs(pairs(x_BlC, x_BlC) if guided else x_BlC, here.stop)
    return f_hat, jnp.concatenate(tokens, axis=1)


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
