"""Token caches: the frozen tokenizer's codes of what training sees, computed once for many epochs.

A cache is a folder of array_record files, written by `var_jax.encode`. Record c·N + i holds the
label and the tokens of image i as training sees it in epoch c.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from var_jax import BadInput
from var_jax.checkpoints.export import fingerprint
from var_jax.data.augmentation import augment_items
from var_jax.data.inventory import checksum_of
from var_jax.data.pipeline import epoch
from var_jax.data.records import (
    MANIFEST,
    Records,
    read_manifest,
    shard_size,
    short,
    sound,
    write_missing,
)
from var_jax.data.sources import Source
from var_jax.data.sources.base import Item
from var_jax.models.tokenizer import Tokenizer, encode_images
from var_jax.schedule import Schedule, num_tokens
from var_jax.sharding.mesh import put_batch
from var_jax.tools.paths import user_path

KIND = "a token cache"  # in manifests
RECORD = np.dtype("<u2")  # label and tokens below 65,536; array_record compresses the rest


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """One split of a cache as a `Source` of `tokens`, int32 (L,), and `label`, int32 ().

    Training sees in its first `copies` epochs the crops it would see from the images, then those
    again in other orders.
    """

    records: Records
    copies: int
    class_names: tuple[str, ...]
    length: int

    def __len__(self) -> int:
        return len(self.records) // self.copies

    def __getitem__(self, index: int) -> Item:
        data = self.records[index]
        if len(data) != RECORD.itemsize * (1 + self.length):
            path = self.records.path(index // self.records.shard_size)
            raise BadInput(f"{path} is damaged: a record has {len(data)} bytes; encode it again.")
        numbers = np.frombuffer(data, RECORD).astype(np.int32)
        return {"tokens": numbers[1:], "label": numbers[0]}

    def train_item(self, index: int, epoch: int, rng: np.random.Generator) -> Item:
        """The tokens of the image in this epoch; nothing is random."""
        return self[epoch % self.copies * len(self) + index]


def open_tokens(
    folder: str,
    split: str,
    fingerprint: str,
    patch_nums: Schedule,
    source: Source,
    **settings: Any,
) -> TokenCache:
    """A split of a token cache: of a tokenizer with this fingerprint and schedule, of `source`.

    `settings` is what its manifest must say of the crops, such as flip=True and seed=0.

    Raises: BadInput if it is of another tokenizer, images or crops, unfinished or no cache.
    """
    folder = str(user_path(folder, "data.tokens"))
    manifest = read_manifest(epath.Path(folder), KIND)
    found = manifest | {
        f"{split}_images": manifest.get("pictures", {}).get(split),
        f"checksum_of_{split}_images": manifest.get("checksum", {}).get(split),
    }
    wanted = {
        "tokenizer": fingerprint,
        "patch_nums": patch_nums,
        **settings,
        f"{split}_images": len(source),
        f"checksum_of_{split}_images": checksum_of(source),
        "class_names": list(source.class_names),
    }
    for name, ours in json.loads(json.dumps(wanted)).items():  # as a manifest has them
        if found.get(name) != ours:
            raise BadInput(
                f"{folder} holds tokens made with {name}={short(found.get(name))}, but this run has"
                f" {name}={short(ours)}."
            )
    advice = "remove the folder and write it again by var_jax.encode"
    with sound(epath.Path(folder) / MANIFEST, advice):
        records = records_of(manifest, folder, split)
        records.check_complete()
        copies = int(manifest["copies"][split])
    return TokenCache(records, copies, tuple(source.class_names), num_tokens(patch_nums))


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
    host: int = 0,
    hosts: int = 1,
    **augmentation,
) -> dict[str, Any]:
    """Writes the cache that `config.data.tokens` trains from, and returns its manifest.

    The "train" split holds what training with this `seed` and `augmentation` (as `augment_items`
    takes it) sees in its first `copies` epochs, "validation" what evaluation sees. `about` joins
    the manifest. `mesh` is of this process's devices: processes share the shards between them,
    not the batches. Shards that are there already stay.

    Raises: BadInput if `out` holds something else, or codes or classes are too many.
    """
    settings = {"seed": seed, **augmentation, **(about or {})}
    manifest = make_manifest(tokenizer, sources, copies, **settings)
    check_counts(tokenizer.config.vocab_size, len(manifest["class_names"]))
    augment = augment_items(**augmentation)

    def make(split: str, rows: range, bar) -> Iterator[bytes]:
        training = {"seed": seed, "augment": augment} if split == "train" else {}
        for batch in epoch(sources[split], batch_size, rows=rows, **training):
            mask = batch.pop("mask")
            tokens = np.asarray(encode_images(tokenizer, put_batch(batch, mesh)["image"]))
            for row in np.flatnonzero(mask):
                yield np.array([batch["label"][row], *tokens[row]]).astype(RECORD).tobytes()
            bar.update(int(mask.sum()))

    parts = [records_of(manifest, str(out), split) for split in sources]
    write_missing(out, manifest, parts, make, "tokens", host, hosts)
    return manifest


def make_manifest(
    tokenizer: Tokenizer, sources: Mapping[str, Source], copies: int, **settings: Any
) -> dict[str, Any]:
    """The manifest of a cache: its tokenizer, its images, and how they are cropped."""
    counts = {split: len(source) for split, source in sources.items()}
    many = {split: copies if split == "train" else 1 for split in sources}
    return {
        "kind": KIND,
        "tokenizer": fingerprint(tokenizer),
        "patch_nums": tokenizer.config.patch_nums,
        **settings,
        "pictures": counts,
        "checksum": {split: checksum_of(source) for split, source in sources.items()},
        "copies": many,
        "shard_size": shard_size(max(counts[split] * many[split] for split in sources)),
        "class_names": next(iter(sources.values())).class_names,
    }


def records_of(manifest: Mapping[str, Any], folder: str, split: str) -> Records:
    """The records of one split."""
    count = manifest["copies"][split] * manifest["pictures"][split]
    return Records(folder, split, count, manifest["shard_size"])


def check_counts(codes: int, classes: int) -> None:
    """Raises BadInput unless both fit in a record."""
    most = np.iinfo(RECORD).max + 1
    if max(codes, classes) > most:
        raise BadInput(f"{codes} codes and {classes} classes; a token cache has room for {most}.")
