"""Attention over blocks of tokens: a token sees its own block and earlier ones (VAR §3.2).

`attention` is the same function in four programs; which one runs depends on the platform.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from var_jax import BadInput
from var_jax.models import attention_tpu
from var_jax.models.backend import has_fused_attention, platform
from var_jax.schedule import Pattern
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import on_mesh, reshard

MIN_ROWS = 64  # tokens of a part: fewer make products so thin that masking more is cheaper


def attention(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B L H N"],
    v: Float[Array, "B L H N"],
    pattern: Pattern,
    *,
    q_bias: Float[Array, "H N"] | None = None,
    scale: Float[Array, " H"] | None = None,
    qk_norm: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B L H N"]:
    """softmax(q·k) over the tokens that `pattern` shows, times v; softmax in float32.

    First q + q_bias, both q and k divided by their norms under `qk_norm`, q times `scale`.
    `implementation` is one of

    - masked: all L × L products, then a mask. The plain one that the others are compared with.
    - blocks: each block with the keys it sees, small blocks together: 1 % of the products are
      hidden at 680 tokens of ten scales.
    - kernel: Pallas kernels for TPU that take in all of the above; elsewhere they are interpreted,
      which is slow. 128 must be a multiple of N.
    - cudnn: NVIDIA's fused attention, bfloat16 only.
    - auto: kernel on TPU, cudnn on NVIDIA GPUs, blocks elsewhere and where those do not apply.

    Raises: BadInput if `implementation` is none of these.
    """
    if q.shape[1] != pattern.length:
        raise ValueError(f"{q.shape[1]} tokens; the pattern is of {pattern.length}.")
    if implementation == "auto":
        implementation = choose(q.dtype, q.shape[-1])
    if implementation == "kernel":
        H, N = q.shape[2:]
        q_bias = jnp.zeros((H, N)) if q_bias is None else q_bias
        scale = jnp.ones(H) if scale is None else scale
        options = {"pattern": pattern, "qk_norm": qk_norm, "interpret": platform() != "tpu"}
        return attention_tpu.attention(q, k, v, q_bias, scale, **options)
    q, k = prepare(q, k, q_bias, scale, qk_norm)
    mask = pattern.mask()
    if implementation in ("masked", "blocks"):
        parts = [slice(0, q.shape[1])] if implementation == "masked" else joined_blocks(pattern)
        seen = [(s, visible(mask[s])) for s in parts]
        mixed = [dense(q[:, s], k[:, keys], v[:, keys], mask[s, keys]) for s, keys in seen]
        return jnp.concatenate(mixed, axis=1)
    if implementation == "cudnn":
        return cudnn(q, k, v, mask)
    raise BadInput(
        f"attention={implementation!r} is not one of auto, masked, blocks, kernel, cudnn."
    )


def prepare(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B S H N"],
    q_bias: Float[Array, "H N"] | None,
    scale: Float[Array, " H"] | None,
    qk_norm: bool,
) -> tuple[Float[Array, "B L H N"], Float[Array, "B S H N"]]:
    """q and k as the softmax takes them; float32 in between."""
    q32 = q.astype(jnp.float32)
    if q_bias is not None:
        q32 = q32 + q_bias[None, None]
    if qk_norm:
        q32, k = unit(q32), unit(k.astype(jnp.float32)).astype(k.dtype)
    if scale is not None:
        q32 = q32 * scale[None, None, :, None]
    return q32.astype(q.dtype), k


def choose(dtype: DTypeLike, head_dim: int) -> str:
    """The fastest implementation that applies."""
    if platform() == "tpu" and 128 % head_dim == 0:
        return "kernel"
    if has_fused_attention() and dtype == jnp.bfloat16 and head_dim in range(8, 129, 8):
        return "cudnn"
    return "blocks"


def joined_blocks(pattern: Pattern) -> list[slice]:
    """Consecutive blocks, joined until a part and all that is left each have `MIN_ROWS` tokens."""
    parts, start = [], 0
    for end in pattern.ends:
        if end == pattern.length or min(end - start, pattern.length - end) >= MIN_ROWS:
            parts.append(slice(start, end))
            start = end
    return parts


def visible(mask: Bool[np.ndarray, "l L"]) -> slice:
    """The keys from the first to the last that some query sees."""
    keys = np.flatnonzero(mask.any(axis=0))
    return slice(keys[0], keys[-1] + 1)


def dense(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B S H N"],
    v: Float[Array, "B S H N"],
    mask: Bool[np.ndarray, "L S"] | Bool[Array, "L S"] | None = None,
) -> Float[Array, "B L H N"]:
    """Attention over all of k, v, or those that `mask` leaves; q already scaled."""
    if isinstance(mask, np.ndarray) and mask.all():
        mask = None
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("BHLN,BHSN->BHLS", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weight = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BHLS,BHSN->BHLN", weight, v).swapaxes(1, 2)


def cudnn(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B S H N"],
    v: Float[Array, "B S H N"],
    mask: Bool[np.ndarray, "L S"] | None = None,
) -> Float[Array, "B L H N"]:
    """`dense` in one program of NVIDIA's, which never holds all products.

    It wants lengths that are even: where one is odd a token is added, a key that is hidden.
    """
    L, S = q.shape[1], k.shape[1]
    mask = np.ones((L, S), bool) if mask is None else mask
    mask = np.pad(mask, ((0, L % 2), (0, S % 2)))
    mask[L:, 0] = True  # an added query must see something
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    def run(q, k, v):  # the mask is made here: an array from outside would lie on the mesh
        given = None if mask.all() else jnp.asarray(mask)[None, None]
        how = {"mask": given, "scale": 1.0, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q, k, v, **how)

    return per_device(run)(even(q), even(k), even(v))[:, :L]


def per_device(run: Callable[..., Array]) -> Callable[..., Array]:
    """`run` on each device's own images and heads, for q, k, v (B,L,H,N)."""
    if not on_mesh():
        return run
    spec = jax.sharding.PartitionSpec(BATCH, None, "tensor")
    mapped = jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return lambda *qkv: mapped(*reshard(qkv, BATCH, None, "tensor"))


def unit(x: Float[Array, "*rest N"]) -> Float[Array, "*rest N"]:
    """Vectors at length 1."""
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))
