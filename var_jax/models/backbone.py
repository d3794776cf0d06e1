"""What all transformers share: conditions, the stack of blocks with and without a cache, the head.

`var`, `raster` and `dit` differ in what they read and in which tokens see which.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TransformerConfig
from var_jax.models import backend, blocks
from var_jax.models.attention import attention, choose
from var_jax.models.blocks import (
    Modulation,
    drop_path,
    layer_norm,
    modulate,
    run_blocks,
    stack_blocks,
)
from var_jax.models.cache import Attend, Cache
from var_jax.sharding.mesh import BATCH, layout_of
from var_jax.sharding.ops import (
    flatten_tokens,
    project,
    reshard,
    take,
    unflatten_tokens,
)

LAYOUT = blocks.LAYOUT | {
    "head_ada": ("fsdp",),
    "head": ("fsdp", "tensor"),
    "class_embed": (None, "fsdp"),
    "pos_embed": (None, "fsdp"),
}


class Condition(NamedTuple):
    """What a class says to all blocks and to the head (AdaLN): the same for every token."""

    blocks: Modulation
    head: Float[Array, "#B 2 D"]


class Backbone(nnx.Module):
    """Blocks and head under a class embedding. An immutable pytree; subclasses add inputs."""

    layout = staticmethod(layout_of(LAYOUT))  # of the weights on the mesh

    def __init__(self, config: TransformerConfig, outputs: int, *, rngs: nnx.Rngs):
        """The weights behind the input layer; `outputs` is the width of the head."""
        D, std = config.width, (3 * config.width) ** -0.5
        if config.shared_adaln:
            self.ada, self.ada_bias = normal((D, 6, D), std, rngs), zeros(6, D)
        self.blocks = stack_blocks(config, rngs.params())
        if config.adaln:
            self.head_ada, self.head_ada_bias = normal((D, 2, D), 0.5 * std, rngs), zeros(2, D)
        else:
            self.norm_offset = zeros(2, D)  # scale less 1, then shift
        self.head, self.head_bias = normal((D, outputs), 0.02 * std, rngs), zeros(outputs)
        self.config = config
        self.class_embed: nnx.Param

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the blocks."""
        return backend.compute_dtype(self.config.dtype)

    def embed_labels(self, labels: Int32[Array, " B"]) -> Float[Array, "B D"]:
        """The class as a vector, which also conditions every AdaLN; the last is "no class"."""
        return take(self.class_embed[...], labels)

    def block_cond(self, cond: Float[Array, "B D"]) -> Float[Array, "B ..."]:
        """What the blocks are conditioned on."""
        if not self.config.shared_adaln:
            return cond
        return modulate(cond, self.ada, self.ada_bias, self.dtype)

    def run(
        self, x: Float[Array, "B L D"], cond: Float[Array, "B D"], key: Key[Array, ""] | None
    ) -> Float[Array, "B L D"]:
        """All blocks over all tokens at once. With a `key` drop-path is on."""
        pattern = self.config.pattern

        def attend(q, k, v, query):
            options = {"implementation": self.attention, **query}
            return attention(q, k, v, pattern, **options), None

        keep = None if key is None else drop_path(self.config, key, x.shape[0])
        return run_blocks(self.blocks, x, self.block_cond(cond), attend, keep)

    def condition(self, labels: Int32[Array, " B"]) -> Condition:
        """What `run_cached` and `head_out` take, for those who call them many times."""
        cond = self.embed_labels(labels)
        block_cond = self.block_cond(cond)
        of_block = lambda block: block.modulation(block_cond, self.dtype)
        return Condition(jax.lax.map(of_block, self.blocks), self.head_modulation(cond))

    def run_cached(
        self,
        x: Float[Array, "B l D"],
        condition: Condition,
        cache: Cache,
        attend: Attend,
    ) -> tuple[Float[Array, "B l D"], Cache]:
        """All blocks over new tokens; with their keys and values, those of all layers.

        The layers only read the cache: some platforms copy what a loop reads and writes.
        """

        def layer(x, numbered_block):
            number, block, modulation = numbered_block
            return block(x, modulation, functools.partial(attend, cache, number))

        numbers = jnp.arange(self.config.depth)
        return jax.lax.scan(layer, x, (numbers, self.blocks, condition.blocks))

    @property
    def attention(self) -> str:
        """The implementation of attention. A model that cuDNN trained is used elsewhere too."""
        if self.config.attention in ("auto", "cudnn"):
            return choose(self.dtype, self.config.head_dim)
        return self.config.attention

    def cached_attention(self) -> str:
        """The implementation of cached attention: kernel, cudnn or blocks."""
        return "blocks" if self.attention == "masked" else self.attention

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A zeroed cache of `length` tokens for `batch` sequences, in the compute dtype."""
        c = self.config
        shape = (c.depth, batch, length, c.num_heads * c.head_dim)
        empty = lambda: reshard(jnp.zeros(shape, self.dtype), None, BATCH, None, "tensor")
        return Cache(empty(), empty())

    def head_modulation(self, cond: Float[Array, "B D"]) -> Float[Array, "#B 2 D"]:
        """Scale less 1 and shift ahead of the head."""
        if not self.config.adaln:
            return self.norm_offset[...][None]
        return modulate(cond, self.head_ada, self.head_ada_bias, self.dtype)

    def head_out(
        self,
        x: Float[Array, "B L D"],
        cond: Float[Array, "B D"] | Condition,
        split: str | None = "tensor",
    ) -> Float[Array, "B L V"]:
        """The head, in float32; `split` is the axis of the mesh that its outputs lie on."""
        ada = cond.head if isinstance(cond, Condition) else self.head_modulation(cond)
        scale, shift = ada[:, 0, None], ada[:, 1, None]
        x = (layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift).astype(self.dtype)
        head = self.head[...].astype(self.dtype)
        out = project(flatten_tokens(x), head, split, jnp.float32) + self.head_bias[...][None]
        return unflatten_tokens(out, x.shape[0])


def normal(shape: tuple[int, ...], std: float, rngs: nnx.Rngs) -> nnx.Param:
    """Weights at random."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape))


def zeros(*shape: int) -> nnx.Param:
    """Weights that start at 0."""
    return nnx.Param(jnp.zeros(shape))


def ones(*shape: int) -> nnx.Param:
    """Weights that start at 1."""
    return nnx.Param(jnp.ones(shape))
