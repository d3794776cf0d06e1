"""Any number of images, batch by batch, each from (seed, index) alone."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt8

from var_jax.models.tokenizer import Tokenizer, to_bytes
from var_jax.models.var import Transformer
from var_jax.sampling.autoregressive import Forced, image_keys, sample
from var_jax.sharding.mesh import put_whole, to_host
from var_jax.sharding.ops import on_mesh, round_up


def generate(
    transformer: Transformer,
    tokenizer: Tokenizer,
    labels: Int32[np.ndarray, " N"],
    *,
    batch_size: int,
    seed: int = 0,
    index: Int32[np.ndarray, " N"] | None = None,
    forced: Forced | None = None,
    **how,
) -> Iterator[tuple[UInt8[np.ndarray, "b H W 3"], Int32[np.ndarray, "b L"]]]:
    """Images 0..255 and tokens, in order, each from `seed` and its `index` (default: 0..N-1).

    `forced` holds N rows, `how` is `sample`'s. The last batch is padded, so that
    one compiled program serves all. Of several processes each gets all images.
    """
    size = round_up(batch_size)
    index = np.arange(len(labels), dtype=np.int32) if index is None else index
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, min(start + batch_size, len(labels)))
        padded = np.resize(rows, size)
        take = lambda array, padded=padded: put(array[padded])
        images, tokens = sample(
            transformer,
            tokenizer,
            take(labels),
            image_keys(seed, take(index)),
            forced=None if forced is None else Forced(*map(take, forced)),
            **how,
        )
        images, tokens = to_host((images, tokens))
        yield to_bytes(images)[: len(rows)], tokens[: len(rows)]


def coarse_to_fine(
    tokenizer: Tokenizer, tokens: Int32[np.ndarray, "N L"]
) -> UInt8[np.ndarray, "N K H W 3"]:
    """What an image looks like after each scale: the running sums of its codes, decoded."""
    count = len(tokens)
    padded = put(np.resize(tokens, (round_up(count), tokens.shape[1])))
    sums = running_sums(tokenizer, padded)
    made = [to_bytes(to_host(decode_latent(tokenizer, f_hat)))[:count] for f_hat in sums]
    return np.stack(made, axis=1)


running_sums = jax.jit(lambda tokenizer, tokens: tokenizer.quantizer.decode(tokens))
decode_latent = jax.jit(Tokenizer.decode_latent)


def put(array: np.ndarray) -> jax.Array:
    """Rows that every process holds, onto the mesh if there is one."""
    return put_whole(array, jax.sharding.get_mesh()) if on_mesh() else jnp.asarray(array)
