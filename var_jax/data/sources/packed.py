"""Encoded images packed into array_record files, for random access on disks and in buckets.

A record is "label name newline", then the image file as it was.
"""

import functools
import os
from collections.abc import Iterator, Mapping

from etils import epath

from var_jax import BadInput
from var_jax.data.records import (
    MANIFEST,
    Records,
    images_checksum,
    read_manifest,
    shard_size,
    sound,
    write_missing,
)
from var_jax.data.sources.base import EncodedImages

KIND = "encoded pictures"  # in manifests, those of older folders too


def open_packed(folder: epath.Path, split: str) -> EncodedImages:
    """One split of a folder that `pack` wrote.

    Raises: BadInput if it is unfinished, incomplete or something else.
    """
    manifest = read_manifest(folder, KIND)
    with sound(folder / MANIFEST, "remove the folder and write it again by var_jax.prepare"):
        count, class_names = int(manifest["counts"][split]), tuple(manifest["class_names"])
        records = Records(str(folder), split, count, int(manifest["shard_size"]))
        if count < 1:
            raise ValueError(f"{count} images")
        records.check_complete()

    def read(index: int) -> tuple[bytes, int, str]:
        header, _, data = records[index].partition(b"\n")
        label, _, name = header.partition(b" ")
        if not (label.isdigit() and int(label) < len(class_names)):
            raise BadInput(
                f"{folder}: record {index} of {split} has label {label[:20]!r}; expected 0 to"
                f" {len(class_names) - 1}. Pack the images again."
            )
        return data, int(label), f"{folder}/{split}/{os.fsdecode(name)}"

    return EncodedImages(len(records), read, class_names)


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
        "checksum": {
            split: images_checksum(len(images), images.load) for split, images in splits.items()
        },
        "shard_size": shard_size(max(counts.values())),
        "class_names": list(splits["train"].class_names),
    }
    parts = [Records(str(out), split, counts[split], manifest["shard_size"]) for split in splits]
    write_missing(out, manifest, parts, functools.partial(_records, splits), "packing")


def _records(splits: Mapping[str, EncodedImages], split: str, rows: range, bar) -> Iterator[bytes]:
    for row in rows:
        data, label, name = splits[split].load(row)
        name = "/".join(name.replace("\n", " ").split("/")[-2:])  # class folder and file
        yield f"{label} {name}\n".encode("utf-8", "surrogateescape") + data
        bar.update()
