"""Writes token caches: the frozen tokenizer over what training will see, once for many epochs."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Int32, UInt8

from var_jax import BadInput
from var_jax.checkpoints.export import fingerprint
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import drawn
from var_jax.data.records import claim, finish, finished, write_shard
from var_jax.data.sources import Source
from var_jax.data.token_cache import PACKED, describe, pack, records_of
from var_jax.models.tokenizer import Tokenizer, to_float
from var_jax.sharding.mesh import put_batch
from var_jax.tools.logs import progress


def write_cache(
    tokenizer: Tokenizer,
    sources: Mapping[str, Source],
    out: epath.Path,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    copies: int = 1,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    **augmentation,
) -> dict[str, Any]:
    """Writes the cache that `config.data.tokens` trains from, and returns its manifest.

    Of "train" the codes of what training with this `seed` and `augmentation` (as `augment_items`
    takes it) sees in its first `copies` epochs, of "validation" of what evaluation sees. `about`
    joins the manifest. `mesh` is of this process's devices: processes share the shards between
    them, not the batches. Shards that are there already stay.

    Raises: BadInput if `out` holds something else, or codes or classes are too many.
    """
    schedule, how = tokenizer.config.patch_nums, {"seed": seed, **augmentation, **(about or {})}
    manifest = describe(fingerprint(tokenizer), schedule, sources, copies, **how)
    check_counts(tokenizer.config.vocab_size, len(manifest["class_names"]))
    claim(out, manifest)
    records = {split: records_of(manifest, str(out), split) for split in sources}
    todo = [
        (split, shard)
        for split in sources
        for shard in records[split].missing()
        if shard % jax.process_count() == jax.process_index()
    ]
    if not todo and finished(out):
        return manifest
    with progress(sum(len(records[split].rows(i)) for split, i in todo), 0, "tokens") as bar:
        for split, shard in todo:
            source, rows, changed = sources[split], records[split].rows(shard), {}
            if split == "train":
                changed = {"seed": seed, "augment": augment_items(source, **augmentation)}
            batches = drawn(source, rows, batch_size, **changed)
            write_shard(records[split].path(shard), packed(tokenizer, batches, mesh, bar))
    if not any(part.missing() for part in records.values()):
        finish(out, manifest)
    return manifest


def packed(tokenizer: Tokenizer, batches: Iterator[dict], mesh, bar) -> Iterator[bytes]:
    """The records of some batches."""
    for batch in batches:
        mask = batch.pop("mask")
        tokens = np.asarray(encode(tokenizer, put_batch(batch, mesh)["image"]))
        for row in np.flatnonzero(mask):
            yield pack(tokens[row], batch["label"][row])
        bar.update(int(mask.sum()))


@jax.jit
def encode(tokenizer: Tokenizer, image: UInt8[Array, "B H W 3"]) -> Int32[Array, "B L"]:
    """The codes of a batch of images."""
    return tokenizer.encode(to_float(image))


def check_counts(codes: int, classes: int) -> None:
    """Raises BadInput unless both fit in a record."""
    most = np.iinfo(PACKED).max + 1
    if max(codes, classes) > most:
        raise BadInput(f"{codes} codes and {classes} classes; a token cache has room for {most}.")
