"""The next-scale transformer (VAR §3.2): GPT blocks under AdaLN, all tokens of a scale at once.

The input at scale k is the running sum of all coarser scales, area-averaged to p_k × p_k (scale 1
reads the class embedding). Blocks are stacked along a leading axis and scanned (on CPU, a few are
unrolled).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TransformerConfig
from var_jax.models.attention import attention, dense, prepare
from var_jax.schedule import level_ids, slices
from var_jax.sharding.ops import (
    BATCH,
    einsum,
    images,
    merge_heads,
    pin,
    platform,
    project,
    reshape,
    rows,
    split_heads,
    take,
    whole,
)

# How the large weights lie on the mesh (blocks carry one axis more); the rest is replicated.
# 'fsdp' shards are gathered before use, 'tensor' splits heads, MLP and vocabulary.
LAYOUT = {
    "qkv": ("fsdp", None, "tensor"),
    "proj": ("tensor", None, "fsdp"),
    "fc1": ("fsdp", "tensor"),
    "fc2": ("tensor", "fsdp"),
    "ada": ("fsdp",),
    "head_ada": ("fsdp",),
    "head": ("fsdp", "tensor"),
    "class_embed": (None, "fsdp"),
    "pos_embed": (None, "fsdp"),
}

T = TypeVar("T")

MAX_LOG_SCALE = math.log(100.0)  # attention temperature is clipped here
MOST_UNROLLED = 8  # layers


class Cache(NamedTuple):
    """Keys and values: of the scales decoded so far, or of one layer's new tokens."""

    k: Float[Array, "*depth B L H N"]
    v: Float[Array, "*depth B L H N"]


class Block(nnx.Module):
    """Attention and MLP, each scaled, shifted and gated by the class (AdaLN)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, H, N = config.width, config.num_heads, config.head_dim
        F = round(D * config.mlp_ratio)
        std = (3 * D) ** -0.5
        out_std = std / (2 * config.depth) ** 0.5  # keeps the residual stream's variance with depth
        draw = lambda shape, std: nnx.Param(std * jax.random.normal(rngs.params(), shape))
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape))
        # Gates (gamma) start near zero, scales and shifts at half size.
        ada_std = jnp.array([config.gamma_std] * 2 + [0.5] * 4)[:, None]
        if config.shared_adaln:
            self.ada_offset = draw((6, D), ada_std * D**-0.5)
        else:
            self.ada, self.ada_bias = draw((D, 6, D), ada_std * std), zeros(6, D)
        self.qkv, self.q_bias, self.v_bias = draw((D, 3, H, N), std), zeros(H, N), zeros(H, N)
        if config.qk_norm:
            self.log_scale = nnx.Param(jnp.full((H,), math.log(4.0), jnp.float32))
        self.proj, self.proj_bias = draw((H, N, D), out_std), zeros(D)
        self.fc1, self.fc1_bias = draw((D, F), std), zeros(F)
        self.fc2, self.fc2_bias = draw((F, D), out_std), zeros(D)
        self.config = config

    def modulation(self, cond: Float[Array, "B ..."], dtype: jnp.dtype) -> list[Array]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (B,1,D).

        `cond` is the class embedding (B,D), or under shared AdaLN its projection (B,6,D).
        """
        if self.config.shared_adaln:
            ada = cond + self.ada_offset[...]
        else:
            ada = modulate(cond, self.ada, self.ada_bias, dtype)
        return [ada[:, i, None].astype(dtype) for i in range(6)]

    def project_qkv(
        self, x: Float[Array, "B L D"], scale: Float[Array, "B 1 D"], shift: Float[Array, "B 1 D"]
    ) -> list[Float[Array, "M HN"]]:
        """q, k, v of all tokens, without biases."""
        x = rows(layer_norm(x) * (1 + scale) + shift)
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

    def project_mixed(self, mixed: Float[Array, "M HN"]) -> Float[Array, "M D"]:
        """Attention's result back to the width of the residual stream.

        Attention weights sum to 1, so the bias of v is the same as this much more bias here.
        """
        proj = merge_heads(self.proj[...].astype(mixed.dtype), axis=0)
        v_bias = merge_heads(pin(self.v_bias[...].astype(proj.dtype), "tensor"))
        bias = self.proj_bias + einsum("F,FD->D", v_bias, whole(proj))
        return project(mixed, proj) + bias.astype(mixed.dtype)

    def widen(
        self,
        x: Float[Array, "B L D"],
        gate: Float[Array, "B 1 D"],
        out: Float[Array, "M D"],
        scale: Float[Array, "B 1 D"],
        shift: Float[Array, "B 1 D"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "M F"]]:
        """The residual stream (B,L,D) after attention, and the MLP's first product (M,F)."""
        x = self.add(x, gate, out)
        h = rows(layer_norm(x) * (1 + scale) + shift)
        return x, project(h, self.fc1[...].astype(x.dtype), "tensor")

    def narrow(self, h: Float[Array, "M F"]) -> Float[Array, "M D"]:
        """What the MLP adds to the residual stream."""
        h = jax.nn.gelu(h + self.fc1_bias.astype(h.dtype))
        return project(h, self.fc2[...].astype(h.dtype)) + self.fc2_bias.astype(h.dtype)

    def add(
        self, x: Float[Array, "B L D"], gate: Float[Array, "B #L D"], out: Float[Array, "M D"]
    ) -> Float[Array, "B L D"]:
        """A gated branch joins the residual stream."""
        return x + gate * images(out, x.shape[0])

    def heads(self, y: Float[Array, "M HN"], x: Float[Array, "B L D"]) -> Float[Array, "B L H N"]:
        """The heads of all tokens of each image."""
        return split_heads(images(y, x.shape[0]), self.config.head_dim)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        cond: Float[Array, "B ..."],
        attend: Callable[..., tuple[Array, T]],
        keep: Float[Array, "2 B 1 1"] | None = None,
    ) -> tuple[Float[Array, "B L D"], T]:
        """One block; `attend(q, k, v, how)` gives the mixed values and whatever else it makes.

        `keep` is drop-path's mask.
        """
        again = jax.checkpoint if self.config.remat == "selective" else lambda f, **_: f
        part = lambda f, *args: again(f, prevent_cse=False)(self, *args)
        modulation = part(functools.partial(Block.modulation, dtype=x.dtype), cond)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        keep1, keep2 = (1, 1) if keep is None else keep.astype(x.dtype)
        q, k, v = part(Block.project_qkv, x, scale1, shift1)
        mixed, made = attend(*(self.heads(y, x) for y in (q, k, v)), self.query)
        out = part(Block.project_mixed, rows(merge_heads(mixed)))
        x, h = part(Block.widen, x, keep1 * gamma1, out, scale2, shift2)
        return part(Block.add, x, keep2 * gamma2, part(Block.narrow, h)), made


class Transformer(nnx.Module):
    """Class label and coarser scales → logits of every token. An immutable pytree."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, K, V = config.width, len(config.patch_nums), config.vocab_size
        std = (3 * D) ** -0.5
        draw = lambda *shape, std=std: nnx.Param(std * jax.random.normal(rngs.params(), shape))
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape))
        self.class_embed = draw(config.num_classes + 1, D)  # the last row stands for "no class"
        self.start = draw(1, D)
        self.pos_embed, self.level_embed = draw(config.num_tokens, D), draw(K, D)
        self.word, self.word_bias = draw(config.latent_dim, D), zeros(D)
        if config.shared_adaln:
            self.ada, self.ada_bias = draw(D, 6, D), zeros(6, D)
        layers = jax.random.split(rngs.params(), config.depth)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(layers)
        self.head_ada, self.head_ada_bias = draw(D, 2, D, std=0.5 * std), zeros(2, D)
        self.head, self.head_bias = draw(D, V, std=0.02 * std), zeros(V)
        self.config = config

    def __call__(
        self,
        labels: Int32[Array, " B"],
        x_BMC: Float[Array, "B M C"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L V"]:
        """Logits of all L tokens under teacher forcing.

        Labels are 0..num_classes, the last meaning "no class"; `x_BMC` is the quantizer's
        `teacher_input`, M = L-1. With a `key` drop-path is on.
        """
        cond, x = self.embed_labels(labels), self.embed_inputs(x_BMC)
        x = jnp.concatenate([self.embed_start(labels), x], axis=1)
        config = self.config

        def attend(q, k, v, query):
            how = {"implementation": config.attention, **query}
            return attention(q, k, v, config.patch_nums, **how), None

        def layer(x, block_keep):
            block, keep = block_keep
            return block(x, block_cond, attend, keep)

        block_cond = self.block_cond(cond)
        if config.remat == "full":
            layer = jax.checkpoint(layer, prevent_cse=False)
        keep = None if key is None else self.drop_path(key, x.shape[0])
        # A CPU takes an eighth less time for a step of configs/emoji.py when layers are unrolled,
        # and more memory with each. Of rematerialized ones XLA would drop the second computation.
        few = config.depth <= MOST_UNROLLED
        unroll = platform() == "cpu" and config.remat == "none" and few
        x, _ = jax.lax.scan(layer, x, (self.blocks, keep), unroll=unroll)
        return self.logits(x, cond)

    def decode(
        self, k: int, x_BlD: Float[Array, "B l D"], labels: Int32[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B l V"], Cache]:
        """Logits of scale k given the cached keys and values of the scales before it.

        The cache is carried through the layers, each writing its own part: one buffer, in place.
        """
        here = slices(self.config.patch_nums)[k]
        cond = self.embed_labels(labels)

        def layer(carry, numbered_block):
            x, cache = carry
            number, block = numbered_block

            def attend(q, k, v, query):
                q, k = prepare(q, k, **query)
                start = (number, 0, here.start, 0, 0)
                write = lambda c, n: jax.lax.dynamic_update_slice(c, n.astype(c.dtype)[None], start)
                written = jax.tree.map(write, cache, Cache(k, v))
                return dense(q, *(c[number, :, : here.stop] for c in written)), written

            return block(x, block_cond, attend), None

        block_cond = self.block_cond(cond)
        layers = jnp.arange(self.config.depth), self.blocks
        (x, cache), _ = jax.lax.scan(layer, (x_BlD, cache), layers)
        return self.logits(x, cond), cache

    def empty_cache(self, batch: int) -> Cache:
        """A zeroed cache for `batch` sequences, in the compute dtype."""
        c = self.config
        shape = (c.depth, batch, c.num_tokens, c.num_heads, c.head_dim)
        zeros = lambda: pin(jnp.zeros(shape, self.dtype), None, BATCH, None, "tensor")
        return Cache(zeros(), zeros())

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the blocks."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")

    def position(self) -> Float[Array, "L D"]:
        """Where a token lies plus which scale it belongs to."""
        return whole(self.pos_embed[...]) + self.level_embed[...][level_ids(self.config.patch_nums)]

    def embed_labels(self, labels: Int32[Array, " B"]) -> Float[Array, "B D"]:
        """The class as a vector, which also steers every AdaLN."""
        return take(self.class_embed[...], labels)

    def embed_start(self, labels: Int32[Array, " B"]) -> Float[Array, "B 1 D"]:
        """The input of scale 1."""
        x = self.embed_labels(labels)[:, None] + self.start[...] + self.position()[:1]
        return x.astype(self.dtype)

    def embed_inputs(self, x_BMC: Float[Array, "B M C"], start: int = 1) -> Float[Array, "B M D"]:
        """The inputs of the tokens from position `start` on."""
        x = project(rows(x_BMC), self.word[...]) + self.word_bias[...]
        x = images(x, x_BMC.shape[0])
        return (x + self.position()[start : start + x_BMC.shape[1]]).astype(self.dtype)

    def block_cond(self, cond: Float[Array, "B D"]) -> Float[Array, "B ..."]:
        """What the blocks are conditioned on."""
        if not self.config.shared_adaln:
            return cond
        return modulate(cond, self.ada, self.ada_bias, self.dtype)

    def drop_path(self, key: Key[Array, ""], batch: int) -> Float[Array, "depth 2 B 1 1"]:
        """Which residual branches an image keeps, scaled to keep the mean (stochastic depth)."""
        rate = jnp.linspace(0, self.config.drop_path, self.config.depth)[:, None, None, None, None]
        shape = (self.config.depth, 2, batch, 1, 1)
        keep = jax.random.uniform(key, shape) >= rate
        return pin(keep / (1 - rate), None, None, BATCH)

    def logits(self, x: Float[Array, "B L D"], cond: Float[Array, "B D"]) -> Float[Array, "B L V"]:
        """The head; logits are float32."""
        ada = modulate(cond, self.head_ada, self.head_ada_bias, self.dtype)
        scale, shift = ada[:, 0, None], ada[:, 1, None]
        x = (layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift).astype(self.dtype)
        head = self.head[...].astype(self.dtype)
        logits = project(rows(x), head, "tensor", jnp.float32) + self.head_bias[...]
        return images(logits, x.shape[0])


def modulate(
    cond: Float[Array, "B D"], w: nnx.Param, bias: nnx.Param, dtype: jnp.dtype
) -> Float[Array, "B x E"]:
    """The class's say in a normalization: silu, then a linear layer; float32."""
    D, *shape = w.shape
    matrix = reshape(w[...].astype(dtype), D, math.prod(shape))
    ada = project(jax.nn.silu(cond).astype(dtype), matrix).reshape(-1, *shape)
    return ada.astype(jnp.float32) + bias[...]


def layer_norm(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """LayerNorm without gain or bias, in float32.

    Both means in one pass over x. They cancel only where the mean is far above the deviation, which
    it is not in a residual stream.
    """
    x32 = x.astype(jnp.float32)
    mean, square = x32.mean(-1, keepdims=True), (x32**2).mean(-1, keepdims=True)
    variance = jnp.maximum(square - mean**2, 0.0)  # a difference: rounding may take it below
    return ((x32 - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)
