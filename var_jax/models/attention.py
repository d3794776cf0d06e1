"""Attention among scales: a token sees its own scale and every coarser one (VAR §3.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from var_jax.scales import slices


def dense(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B S H N"],
    v: Float[Array, "B S H N"],
) -> Float[Array, "B L H N"]:
    """Softmax attention over all of k, v, with q already scaled; softmax in float32."""
    logits = jnp.einsum("BLHN,BSHN->BHLS", q, k, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BHLS,BSHN->BLHN", weight, v)


def block_causal(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B L H N"],
    v: Float[Array, "B L H N"],
    patch_nums: tuple[int, ...],
) -> Float[Array, "B L H N"]:
    """Dense attention of each scale over its prefix: no mask, and no hidden block is computed."""
    parts = [dense(q[:, s], k[:, : s.stop], v[:, : s.stop]) for s in slices(patch_nums)]
    return jnp.concatenate(parts, axis=1)
