"""Encoded images packed into array_record files, for random access on disks and in buckets.

A record is "label name newline", then the image file as it was.
"""

from collections.abc import Iterator, Mapping

from etils import epath

from var_jax import BadInput
from var_jax.data.records import (
    Records,
    begin,
    checksum,
    finish,
    finished,
    read_manifest,
    shard_size,
    write_shard,
)
from var_jax.data.sources.base import EncodedImages
from var_jax.tools.logs import progress

KIND = "encoded pictures"  # in manifests, those of older folders too


def open_packed(folder: epath.Path, split: str) -> EncodedImages:
    """One split of a folder that `pack` wrote.

    Raises: BadInput if it is unfinished, incomplete or something else.
    """
    manifest = read_manifest(folder, KIND)
    records = Records(str(folder), split, manifest["counts"][split], manifest["shard_size"])
    records.check_complete()

    def read(index: int) -> tuple[bytes, int, str]:
        header, _, data = records[index].partition(b"\n")
        label, _, name = header.decode().partition(" ")
        return data, int(label), f"{folder}/{split}/{name}"

    return EncodedImages(len(records), read, tuple(manifest["class_names"]))


def pack(splits: Mapping[str, EncodedImages], out: epath.Path) -> None:
    """Writes the shards that are not there yet, then the manifest; decodes and changes no image.

    Raises: BadInput if `out` holds something else, or the splits have different classes.
    """
    counts = {split: len(images) for split, images in splits.items()}
    if len({images.class_names for images in splits.values()}) > 1:
        raise BadInput("the splits of --source have different classes.")
    manifest = {
        "kind": KIND,
        "counts": counts,
        "checksum": {split: checksum(len(images), images.read) for split, images in splits.items()},
        "shard_size": shard_size(max(counts.values())),
        "class_names": list(splits["train"].class_names),
    }
    begin(out, manifest)
    records = {
        split: Records(str(out), split, counts[split], manifest["shard_size"]) for split in splits
    }
    missing = [(split, shard) for split in splits for shard in records[split].missing()]
    if not missing and finished(out):
        return
    left = sum(len(records[split].rows(shard)) for split, shard in missing)
    with progress(sum(counts.values()), sum(counts.values()) - left, "packing") as bar:
        for split, shard in missing:
            rows = records[split].rows(shard)
            write_shard(records[split].path(shard), _records(splits[split], rows, bar))
    finish(out, manifest)


def _records(images: EncodedImages, rows: range, bar) -> Iterator[bytes]:
    for row in rows:
        data, label, name = images.read(row)
        name = "/".join(name.splitlines()[0].split("/")[-2:])  # class folder and file
        yield f"{label} {name}\n".encode() + data
        bar.update()
