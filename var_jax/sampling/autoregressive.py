"""Sampling: class labels → tokens, scale by scale → image. One jitted program (VAR §3.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.sampling.filters import guide
from var_jax.sampling.filters import top_k as keep_top_k
from var_jax.sampling.filters import top_p as keep_top_p
from var_jax.schedule import slices
from var_jax.sharding.ops import BATCH, in_parts, pin, reshape, take


class Forced(NamedTuple):
    """Tokens that are given; the others are drawn. Editing gives those of a picture."""

    tokens: Int32[Array, "B L"]
    keep: Bool[Array, "B L"]


def image_keys(seed: int, index: Int32[Array, " B"]) -> Key[Array, " B"]:
    """One key an image, from (seed, index) alone: batch size and devices do not matter."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)


@functools.partial(jax.jit, static_argnames=("top_k", "top_p", "smooth"))
def sample(
    transformer: Transformer,
    tokenizer: Tokenizer,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    *,
    cfg: Float[Array, ""] | float | None = 1.5,
    top_k: int = 900,
    top_p: float | tuple[float, ...] = 0.96,
    smooth: bool = False,
    forced: Forced | None = None,
) -> tuple[Float[Array, "B H W 3"], Int32[Array, "B L"]]:
    """Images in [-1, 1] and their tokens, under guidance `cfg` that rises linearly over the scales.

    A label of num_classes means "no class". Without guidance (None) the work is halved. `top_p` is
    of all scales or of each. `smooth` mixes code vectors instead of picking one: nicer to look at,
    not for metrics.
    """
    B, num_scales = labels.shape[0], len(transformer.config.patch_nums)
    top_ps = np.broadcast_to(top_p, num_scales).tolist()
    nobody = jnp.full_like(labels, transformer.config.num_classes)
    double = lambda x, y: x if cfg is None else jnp.concatenate([x, y])
    both = pin(double(labels, nobody), BATCH)
    quantizer, codebook = tokenizer.quantizer, tokenizer.quantizer.codebook[...]
    cache = transformer.empty_cache(len(both))
    x, f_hat, tokens = transformer.embed_start(both), jnp.zeros(()), []
    for k, here in enumerate(slices(transformer.config.patch_nums)):
        ratio = k / max(num_scales - 1, 1)
        logits, cache = transformer.decode(k, x, both, cache)
        logits = pin(logits if cfg is None else guide(logits, cfg * ratio), BATCH)
        logits = keep_top_p(keep_top_k(logits, top_k), top_ps[k])
        scale_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        idx_Bl = jax.vmap(jax.random.categorical)(scale_keys, logits).astype(jnp.int32)
        code_BlC = mix(scale_keys, logits, codebook, ratio) if smooth else take(codebook, idx_Bl)
        if forced is not None:
            given, keep = forced.tokens[:, here], forced.keep[:, here]
            idx_Bl = jnp.where(keep, given, idx_Bl)
            code_BlC = jnp.where(keep[..., None], take(codebook, given), code_BlC)
        side = transformer.config.patch_nums[k]
        code_BppC = reshape(code_BlC, B, side, side, code_BlC.shape[-1])
        f_hat = f_hat + quantizer.contribution(k, code_BppC)
        tokens.append(idx_Bl)
        if k + 1 < num_scales:
            x = transformer.embed_inputs(quantizer.next_input(f_hat, k + 1), here.stop)
            x = pin(double(x, x), BATCH)
    images = in_parts(tokenizer.decode_latent, f_hat, tokenizer.config.images_at_a_time)
    return images, jnp.concatenate(tokens, axis=1)


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
