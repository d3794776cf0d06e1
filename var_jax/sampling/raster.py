"""Sampling from the raster-scan model: one token after another, in one jitted program."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, UInt8

from var_jax import BadInput
from var_jax.config import SamplingConfig
from var_jax.sampling.autoregressive import (
    Weights,
    filtered,
    filters_of,
    pairs,
    to_images,
    unpaired,
)
from var_jax.sampling.filters import Count, Number
from var_jax.sampling.guidance import guide
from var_jax.sharding.ops import data_parallel


@jax.jit
def sample(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: None = None,
    *,
    cfg: Float[Array, ""] | float | None = 1.5,
    top_k: Count = 900,
    top_p: Number | None = 0.96,
    temperature: Number = 1.0,
) -> tuple[UInt8[Array, "B H W 3"], Int32[Array, "B L"]]:
    """Images and their tokens, under guidance `cfg`, the same for all tokens.

    A label of num_classes means "no class". Without guidance (None) the work is halved.
    """
    transformer, guided = weights.transformer, cfg is not None
    if guided:
        labels = pairs(labels, jnp.full_like(labels, transformer.config.num_classes))

    condition = transformer.condition(labels)

    def step(carry, t):
        x, cache = carry
        logits, cache = transformer.decode(t, x, condition, cache)
        logits = logits if cfg is None else guide(*unpaired(logits), cfg)
        logits = filtered(logits, top_k, top_p, temperature)
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        idx_B1 = jax.vmap(jax.random.categorical)(token_keys, logits).astype(jnp.int32)
        read = pairs(idx_B1, idx_B1) if guided else idx_B1
        return (transformer.embed_inputs(read, t + 1), cache), idx_B1

    start = (
        transformer.embed_start(labels),
        transformer.empty_cache(len(labels), transformer.config.num_tokens),
    )
    _, idx_LB1 = jax.lax.scan(step, start, jnp.arange(transformer.config.num_tokens))
    tokens = idx_LB1[..., 0].T
    latent = data_parallel(lambda quantizer, tokens: quantizer.decode(tokens)[-1])
    return to_images(weights, latent(weights.tokenizer.quantizer, tokens)), tokens


def sampler(settings: SamplingConfig, smooth: bool = False) -> functools.partial:
    """`sample` with these settings, as `generate` takes it. Raises: BadInput for `smooth`."""
    if smooth:
        raise BadInput("smooth sampling mixes the codes of a scale; a raster model has none.")
    options = {name: values[0] for name, values in filters_of(settings).items()}
    return functools.partial(sample, cfg=settings.cfg or None, **options)
