"""Codes computed ahead of training, so that the tokenizer runs once instead of every epoch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32

from var_jax import BadInput
from var_jax.data.records import Records, checksum, read_manifest, shard_size
from var_jax.data.sources import Arrays, Pictures, Source

TOKENS = "a token cache"  # the kind of array_record folder
PACKED = np.dtype("<u2")  # codes and classes below 65,536; array_record compresses the rest


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """What `var_jax.encode` writes: record c·N + i holds label and codes of picture i in epoch c.

    So training sees in its first `copies` epochs what it would see from the pictures, then those
    crops again in other orders. Items are `tokens`, int32 (L,), and `label`, int32 ().
    """

    records: Records
    copies: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records) // self.copies

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.draw(index)

    def draw(
        self, index: int, epoch: int = 0, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """The picture's codes as in this epoch; nothing is left to chance."""
        record = self.records[epoch % self.copies * len(self) + index]
        numbers = np.frombuffer(record, PACKED).astype(np.int32)
        return {"tokens": numbers[1:], "label": numbers[0]}


def pack(tokens: Int32[np.ndarray, " L"], label: int) -> bytes:
    """One record."""
    return np.array([label, *tokens]).astype(PACKED).tobytes()


def describe(
    tokenizer: str,
    patch_nums: tuple[int, ...],
    sources: Mapping[str, Source],
    copies: int,
    **how: Any,
) -> dict[str, Any]:
    """The manifest of a cache: whose codes, of how many pictures, changed how.

    Validation is cached once, as evaluation sees it.
    """
    pictures = {split: len(source) for split, source in sources.items()}
    many = {split: copies if split == "train" else 1 for split in sources}
    return {
        "kind": TOKENS,
        "tokenizer": tokenizer,
        "patch_nums": patch_nums,
        **how,
        "pictures": pictures,
        "checksum": {split: checksum_of(source) for split, source in sources.items()},
        "copies": many,
        "shard_size": shard_size(max(pictures[split] * many[split] for split in sources)),
        "class_names": next(iter(sources.values())).class_names,
    }


def records_of(manifest: Mapping[str, Any], folder: str, split: str) -> Records:
    """The records of one split."""
    count = manifest["copies"][split] * manifest["pictures"][split]
    return Records(folder, split, count, manifest["shard_size"])


def checksum_of(source: Source) -> str:
    """The checksum of a source's pictures as they are stored, whatever their size later."""
    if isinstance(source, Pictures):
        return checksum(source.encoded)
    if isinstance(source, Arrays):
        pairs = zip(source.images, source.labels, strict=True)
        return checksum([(image.tobytes(), label) for image, label in pairs])
    items = map(source.__getitem__, range(len(source)))
    return checksum([(item["image"].tobytes(), item["label"]) for item in items])


def open_tokens(
    folder: str,
    split: str,
    fingerprint: str,
    patch_nums: tuple[int, ...],
    source: Source,
    **how: Any,
) -> TokenCache:
    """A split of a token cache: of a tokenizer with this fingerprint and schedule, of `source`.

    `how` is what its manifest must say of the crops, such as flip=True.

    Raises: BadInput if it is another's, of other pictures or crops, unfinished or no cache.
    """
    manifest = read_manifest(epath.Path(folder), TOKENS)
    if missing := {"tokenizer", "patch_nums", "pictures", "checksum", *how} - manifest.keys():
        names = ", ".join(sorted(missing))
        raise BadInput(f"the manifest of {folder} lacks {names}; make the cache anew.")
    theirs = manifest["tokenizer"], tuple(manifest["patch_nums"])
    if theirs != (fingerprint, patch_nums):
        raise BadInput(
            f"{folder} holds codes of tokenizer {theirs[0]} with patch_nums={theirs[1]}, but this"
            f" run has tokenizer {fingerprint} with patch_nums={patch_nums}."
        )
    for name, ours in how.items():
        if manifest[name] != ours:
            raise BadInput(
                f"{folder} holds codes of crops made with {name}={manifest[name]}, but"
                f" data.{name}={ours}."
            )
    if tuple(manifest["class_names"]) != source.class_names:
        raise BadInput(f"{folder} and data.source have different classes.")
    if manifest["pictures"][split] != len(source):
        raise BadInput(
            f"{folder} holds codes of {manifest['pictures'][split]} {split} pictures, but"
            f" data.source has {len(source)}."
        )
    if manifest["checksum"][split] != checksum_of(source):
        raise BadInput(f"{folder} holds codes of other {split} pictures than those of data.source.")
    records = records_of(manifest, folder, split)
    if missing := records.missing():
        raise BadInput(f"{records.path(missing[0])} is missing: {folder} is incomplete.")
    return TokenCache(records, manifest["copies"][split], tuple(manifest["class_names"]))
