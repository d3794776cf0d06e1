"""Fills the token cache: the frozen tokenizer over augmented copies of a source."""

import itertools

import jax
import numpy as np

from var_jax.data.augment import augment_items
from var_jax.data.pipeline import batches, epoch
from var_jax.data.sources import Source
from var_jax.data.tokens import TokenSource
from var_jax.infra.logs import progress
from var_jax.infra.mesh import put_whole, to_host
from var_jax.models.tokenizer import Tokenizer
from var_jax.training.tokenizer_stage import to_float


def tokenize(
    tokenizer: Tokenizer,
    source: Source,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    copies: int = 0,
    seed: int = 0,
    **augmentation,
) -> TokenSource:
    """The codes of every picture as it is and, after those, of `copies` augmented ones.

    One order of pictures whatever the mesh; augmentation as `augment_items` takes it.
    """
    encode = jax.jit(lambda tokenizer, image: tokenizer.encode(to_float(image)))
    rounds = [epoch(source, batch_size)]
    if copies:
        changed = batches(
            source, batch_size=batch_size, seed=seed, augment=augment_items(**augmentation)
        )
        rounds.append(itertools.islice(changed, -(-copies * len(source) // batch_size)))
    tokens, labels = [], []
    with progress(len(source) * (1 + copies), 0, "tokens") as bar:
        for batch in itertools.chain(*rounds):
            mask = batch.pop("mask", np.ones(batch_size, bool))
            image = put_whole({"image": batch["image"]}, mesh)["image"]
            tokens.append(to_host(encode(tokenizer, image))[mask])
            labels.append(batch["label"][mask])
            bar.update(int(mask.sum()))
    end = len(source) * (1 + copies)
    tokens, labels = np.concatenate(tokens)[:end], np.concatenate(labels)[:end]
    return TokenSource(tokens, labels, source.class_names)
