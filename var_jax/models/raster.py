"""The raster-scan baseline: a GPT over the tokens of a single scale, row by row (VQGAN, §3.2).

Esser et al., arXiv 2012.09841; VAR's paper compares itself with it (table 1). A token sees those
before it; the first reads the class embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from var_jax.config import TransformerConfig
from var_jax.models.backbone import LAYOUT, Backbone, Condition, normal
from var_jax.models.cache import Cache, add_token, attend_to_tokens
from var_jax.models.quantizer import Quantizer
from var_jax.sharding.mesh import layout_of
from var_jax.sharding.ops import gather_fsdp, take


class Raster(Backbone):
    """Class label and the tokens before → logits of every token."""

    layout = staticmethod(layout_of(LAYOUT | {"word": (None, "fsdp")}))

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, std = config.width, (3 * config.width) ** -0.5
        self.class_embed = normal((config.num_classes + 1, D), std, rngs)
        self.pos_embed = normal((config.num_tokens, D), std, rngs)
        self.word = normal((config.vocab_size, D), std, rngs)
        super().__init__(config, config.vocab_size, rngs=rngs)

    def __call__(
        self,
        labels: Int32[Array, " B"],
        tokens_BM: Int32[Array, "B M"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L V"]:
        """Logits of all L tokens under teacher forcing, given the first M = L-1.

        Labels are 0..num_classes, the last meaning "no class". With a `key` drop-path is on.
        """
        cond, x = self.embed_labels(labels), self.embed_inputs(tokens_BM)
        x = jnp.concatenate([self.embed_start(labels), x], axis=1)
        return self.head_out(self.run(x, cond, key), cond)

    @staticmethod
    def inputs(quantizer: Quantizer, tokens: Int32[Array, "B L"]) -> Int32[Array, "B M"]:
        """What is read to predict tokens: all but the last."""
        return tokens[:, :-1]

    def decode(
        self,
        t: Int32[Array, ""],
        x_B1D: Float[Array, "B 1 D"],
        condition: Condition,
        cache: Cache,
    ) -> tuple[Float[Array, "B 1 V"], Cache]:
        """Logits of token t given the cached keys and values of those before it."""
        x, new = self.run_cached(x_B1D, condition, cache, attend_to_tokens(t))
        return self.head_out(x, condition), add_token(t, cache, new)

    def embed_start(self, labels: Int32[Array, " B"]) -> Float[Array, "B 1 D"]:
        """The input of the first token."""
        x = self.embed_labels(labels)[:, None] + gather_fsdp(self.pos_embed[...])[None, :1]
        return x.astype(self.dtype)

    def embed_inputs(
        self, tokens_BM: Int32[Array, "B M"], start: int | Int32[Array, ""] = 1
    ) -> Float[Array, "B M D"]:
        """The inputs of the tokens from position `start` on: the tokens before them."""
        position, M = gather_fsdp(self.pos_embed[...]), tokens_BM.shape[1]
        here = jax.lax.dynamic_slice_in_dim(position, start, M)
        return (take(self.word[...], tokens_BM) + here[None]).astype(self.dtype)
