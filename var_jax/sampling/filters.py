"""Which tokens may be drawn: guidance, top-k, top-p (VAR §4, official `helpers.py`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(logits_2BlV: Float[Array, "2B l V"], strength: Float[Array, ""] | float) -> Array:
    """Classifier-free guidance: (1+t)·cond − t·uncond; the batch holds cond, then uncond."""
    cond, uncond = jnp.split(logits_2BlV, 2)
    return (1 + strength) * cond - strength * uncond


def top_k(logits: Float[Array, "... V"], k: int) -> Float[Array, "... V"]:
    """Hides all but the k largest; 0 (or k ≥ V) keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: Float[Array, "... V"], p: Float[Array, ""] | float) -> Float[Array, "... V"]:
    """Hides the tail that holds at most 1-p of the probability, never the best; 0 keeps all."""
    ascending = jnp.sort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (below > 1 - p).at[..., -1].set(True)
    threshold = jnp.min(jnp.where(kept, ascending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits < threshold) & (p > 0), -jnp.inf, logits)
