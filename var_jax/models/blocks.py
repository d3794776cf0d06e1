"""The AdaLN transformer block, and a stack of them along a leading axis (VAR §4)."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from var_jax.config import BlocksConfig
from var_jax.models import backend
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import (
    einsum,
    flatten_tokens,
    gather_fsdp,
    merge_heads,
    project,
    reshape,
    reshard,
    split_heads,
    unflatten_tokens,
)

# How the large weights lie on the mesh (those of stacked blocks have one axis more); the rest is
# replicated. 'fsdp' shards are gathered before use, 'tensor' splits heads and MLP.
LAYOUT = {
    "qkv": ("fsdp", None, "tensor"),
    "proj": ("tensor", None, "fsdp"),
    "fc1": ("fsdp", "tensor"),
    "fc2": ("tensor", "fsdp"),
    "ada": ("fsdp",),
}
MAX_LOG_SCALE = math.log(100.0)  # attention temperature is clipped here
T = TypeVar("T")
Modulation = tuple[Float[Array, "*depth #B 1 D"], ...]  # gates, scales and shifts of AdaLN


class Block(nnx.Module):
    """Attention and MLP, each scaled, shifted and gated by a condition (AdaLN), or plain.

    Which tokens attend to which is the caller's: the block serves VAR, raster-scan and diffusion
    transformers alike.
    """

    def __init__(self, config: BlocksConfig, *, rngs: nnx.Rngs):
        D, H, N = config.width, config.num_heads, config.head_dim
        F = round(D * config.mlp_ratio)
        std = (3 * D) ** -0.5
        out_std = std / (2 * config.depth) ** 0.5  # keeps the residual stream's variance with depth
        draw = lambda shape, std: nnx.Param(std * jax.random.normal(rngs.params(), shape))
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape))
        # Gates (gamma) start near zero, scales and shifts at half size.
        ada_std = jnp.array([config.gamma_std] * 2 + [0.5] * 4)[:, None]
        if not config.adaln:
            self.norm_offset = zeros(4, D)  # scales less 1, then shifts
        elif config.shared_adaln:
            self.ada_offset = draw((6, D), ada_std * D**-0.5)
        else:
            self.ada, self.ada_bias = draw((D, 6, D), ada_std[None] * std), zeros(6, D)
        self.qkv, self.q_bias, self.v_bias = draw((D, 3, H, N), std), zeros(H, N), zeros(H, N)
        if config.qk_norm:
            self.log_scale = nnx.Param(jnp.full((H,), math.log(4.0), jnp.float32))
        self.proj, self.proj_bias = draw((H, N, D), out_std), zeros(D)
        self.fc1, self.fc1_bias = draw((D, F), std), zeros(F)
        self.fc2, self.fc2_bias = draw((F, D), out_std), zeros(D)
        self.config = config

    def modulation(self, cond: Float[Array, "B ..."], dtype: DTypeLike) -> Modulation:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (B,1,D); without AdaLN (1,1,D).

        `cond` is the class embedding (B,D), or under shared AdaLN its projection (B,6,D).
        """
        if not self.config.adaln:
            offset = self.norm_offset[...]
            ada = jnp.concatenate([jnp.ones_like(offset[:2]), offset])[None]
        elif self.config.shared_adaln:
            ada = cond + self.ada_offset[...][None]
        else:
            ada = modulate(cond, self.ada, self.ada_bias, dtype)
        return tuple(ada[:, i, None].astype(dtype) for i in range(6))

    def project_qkv(
        self, x: Float[Array, "B L D"], scale: Float[Array, "#B 1 D"], shift: Float[Array, "#B 1 D"]
    ) -> list[Float[Array, "M HN"]]:
        """q, k, v of all tokens, without biases."""
        x = flatten_tokens(layer_norm(x) * (1 + scale) + shift)
        qkv = self.qkv[...].astype(x.dtype)
        return [project(x, merge_heads(qkv[:, i]), "tensor") for i in range(3)]

    @property
    def query(self) -> dict[str, Any]:
        """How attention is to take the queries."""
        c = self.config
        if not c.qk_norm:
            scale = jnp.full((c.num_heads,), 0.25 * c.head_dim**-0.5)
        else:
            scale = jnp.exp(jnp.minimum(self.log_scale[...], MAX_LOG_SCALE))
        return {"q_bias": self.q_bias[...], "scale": scale, "qk_norm": c.qk_norm}

    def attention_out(self, mixed: Float[Array, "M HN"]) -> Float[Array, "M D"]:
        """Attention's result back to the width of the residual stream.

        Attention weights sum to 1, so the bias of v is the same as this much more bias here.
        """
        proj = merge_heads(self.proj[...].astype(mixed.dtype), axis=0)
        v_bias = merge_heads(reshard(self.v_bias[...].astype(proj.dtype), "tensor"))
        bias = self.proj_bias + einsum("F,FD->D", v_bias, gather_fsdp(proj)).astype(jnp.float32)
        return project(mixed, proj) + bias.astype(mixed.dtype)[None]

    def mlp_in(
        self,
        x: Float[Array, "B L D"],
        gate: Float[Array, "#B 1 D"],
        out: Float[Array, "M D"],
        scale: Float[Array, "#B 1 D"],
        shift: Float[Array, "#B 1 D"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "M F"]]:
        """The residual stream (B,L,D) after attention, and the MLP's first product (M,F)."""
        x = self.add(x, gate, out)
        h = flatten_tokens(layer_norm(x) * (1 + scale) + shift)
        return x, project(h, self.fc1[...].astype(x.dtype), "tensor")

    def mlp_out(self, h: Float[Array, "M F"]) -> Float[Array, "M D"]:
        """What the MLP adds to the residual stream."""
        h = jax.nn.gelu(h + self.fc1_bias.astype(h.dtype)[None])
        return project(h, self.fc2[...].astype(h.dtype)) + self.fc2_bias.astype(h.dtype)[None]

    def add(
        self, x: Float[Array, "B L D"], gate: Float[Array, "#B #L D"], out: Float[Array, "M D"]
    ) -> Float[Array, "B L D"]:
        """A gated branch joins the residual stream."""
        return x + gate * unflatten_tokens(out, x.shape[0])

    def heads(self, y: Float[Array, "M HN"], x: Float[Array, "B L D"]) -> Float[Array, "B L H N"]:
        """The heads of all tokens of each image."""
        return split_heads(unflatten_tokens(y, x.shape[0]), self.config.head_dim)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        cond: Float[Array, "B ..."] | Modulation,
        attend: Callable[..., tuple[Array, T]],
        keep: Float[Array, "2 B 1 1"] | None = None,
    ) -> tuple[Float[Array, "B L D"], T]:
        """One block; `attend(q, k, v, query)` gives the mixed values and whatever else it makes.

        `cond` is as `modulation` takes it, or what that made of it; `keep` is drop-path's mask.
        """
        again = jax.checkpoint if self.config.remat == "selective" else lambda f, **_: f
        # Of unrolled layers XLA would find what it is to recompute among its results, and keep it.
        prevent_cse = backend.unrolls(self.config.depth, self.config.remat)
        part = lambda f, *args: again(f, prevent_cse=prevent_cse)(self, *args)
        if not isinstance(cond, tuple):
            cond = part(functools.partial(Block.modulation, dtype=x.dtype), cond)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = cond
        keep1, keep2 = (1, 1) if keep is None else keep.astype(x.dtype)
        q, k, v = part(Block.project_qkv, x, scale1, shift1)
        mixed, new_kv = attend(*(self.heads(y, x) for y in (q, k, v)), self.query)
        out = part(Block.attention_out, flatten_tokens(merge_heads(mixed)))
        x, h = part(Block.mlp_in, x, keep1 * gamma1, out, scale2, shift2)
        return part(Block.add, x, keep2 * gamma2, part(Block.mlp_out, h)), new_kv


def stack_blocks(config: BlocksConfig, key: Key[Array, ""]) -> Block:
    """`depth` blocks whose weights are stacked along a leading axis."""
    keys = jax.random.split(key, config.depth)
    return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)


def run_blocks(
    blocks: Block,
    x: Float[Array, "B L D"],
    cond: Float[Array, "B ..."],
    attend: Callable[..., tuple[Array, Any]],
    keep: Float[Array, "depth 2 B 1 1"] | None = None,
) -> Float[Array, "B L D"]:
    """All blocks, one after another; `keep` is `drop_path`'s mask."""
    config = blocks.config

    def layer(x, block_keep):
        block, keep = block_keep
        return block(x, cond, attend, keep)[0], None

    if config.remat == "full":
        layer = jax.checkpoint(layer, prevent_cse=False)
    unroll = backend.unrolls(config.depth, config.remat)
    return jax.lax.scan(layer, x, (blocks, keep), unroll=unroll)[0]


def drop_path(
    config: BlocksConfig, key: Key[Array, ""], batch: int
) -> Float[Array, "depth 2 B 1 1"]:
    """Which residual branches an image keeps, scaled to keep the mean (stochastic depth)."""
    rate = jnp.linspace(0, config.drop_path, config.depth)[:, None, None, None, None]
    keep = jax.random.uniform(key, (config.depth, 2, batch, 1, 1)) >= rate
    return reshard(keep.astype(jnp.float32) / (1 - rate), None, None, BATCH)


def modulate(
    cond: Float[Array, "B D"], w: nnx.Param, bias: nnx.Param, dtype: DTypeLike
) -> Float[Array, "B x E"]:
    """Scales, shifts and gates from a condition: silu, then a linear layer; float32."""
    D, *shape = w.shape
    matrix = reshape(w[...].astype(dtype), D, math.prod(shape))
    ada = project(jax.nn.silu(cond).astype(dtype), matrix).reshape(-1, *shape)
    return ada.astype(jnp.float32) + bias[...][None]


def layer_norm(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """LayerNorm without gain or bias, in float32.

    Both means in one pass over x. They cancel only where the mean is far above the deviation, which
    it is not in a residual stream.
    """
    x32 = x.astype(jnp.float32)
    mean, square = x32.mean(-1, keepdims=True), (x32**2).mean(-1, keepdims=True)
    variance = jnp.maximum(square - mean**2, 0.0)  # a difference: rounding may take it below
    return ((x32 - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)
