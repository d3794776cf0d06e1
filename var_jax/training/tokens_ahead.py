"""The frozen tokenizer over a source and augmented copies of it, ahead of training, in memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key, UInt8

from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches, epoch
from var_jax.data.sources import Source
from var_jax.data.token_cache import TokenSource
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.sharding.mesh import put_whole, to_host
from var_jax.sharding.ops import BATCH, pin
from var_jax.tools.logs import progress


def tokenize_ahead(
    tokenizer: Tokenizer,
    source: Source,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    copies: int = 0,
    seed: int = 0,
    mistakes: float = 0.0,
    **augmentation,
) -> TokenSource:
    """The codes of every picture not augmented and, after those, of `copies` augmented ones.

    One order of pictures whatever the mesh; augmentation as `augment_items` takes it, `mistakes` as
    `encode_with_mistakes`.
    """
    encode = jax.jit(encode_with_mistakes, static_argnums=3)
    key = jax.random.fold_in(jax.random.key(seed), 2)  # the loop splits it into the first two
    rounds = [epoch(source, batch_size)]
    more = -(-copies * len(source) // batch_size)  # batches
    if more:
        changed = batches(
            source, batch_size=batch_size, seed=seed, augment=augment_items(source, **augmentation)
        )
        rounds.append(itertools.islice(changed, more))
    tokens, laid, labels = [], [], []
    with progress(len(source) + more * batch_size, 0, "tokens") as bar:
        for i, batch in enumerate(itertools.chain(*rounds)):
            mask = batch.pop("mask", np.ones(batch_size, bool))
            image = put_whole({"image": batch["image"]}, mesh)["image"]
            codes = to_host(encode(tokenizer, image, jax.random.fold_in(key, i), mistakes))
            for found, new in zip((tokens, laid, labels), (*codes, batch["label"]), strict=True):
                found.append(new[mask])
            bar.update(int(mask.sum()))
    end = len(source) * (1 + copies)
    tokens, laid, labels = (np.concatenate(x)[:end] for x in (tokens, laid, labels))
    return TokenSource(tokens, laid, labels, source.class_names)


def encode_with_mistakes(
    tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"], key: Key[Array, ""], most: float
) -> tuple[Int32[Array, "B L"], Int32[Array, "B L"]]:
    """The codes to predict, and those laid: of each picture some are another's in the batch.

    Their share is drawn uniformly from 0 to `most`.

    The tokens of a scale are drawn without seeing each other, so that some will not fit; whoever
    saw this in training, and what then comes next, goes on with one picture and not with a mixture
    (self-correction: Infinity, arXiv 2412.04431). Scales of one token have no such mistakes.
    """
    of_image, of_token = jax.random.split(key)
    share = most * pin(jax.random.uniform(of_image, (len(image), 1, 1)), BATCH)

    def mistake(k: int, idx_Bpp: Int32[Array, "B p p"]) -> Int32[Array, "B p p"]:
        if not most or idx_Bpp.shape[1] == 1:
            return idx_Bpp
        other = pin(jnp.roll(pin(idx_Bpp), max(k % len(image), 1), axis=0), BATCH)
        wrong = pin(jax.random.uniform(jax.random.fold_in(of_token, k), idx_Bpp.shape), BATCH)
        return jnp.where(wrong < share, other, idx_Bpp)

    code = tokenizer.quantizer.encode(tokenizer.latent(to_float(image)), mistake)
    return code.idx, code.laid
