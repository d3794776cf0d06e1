"""Packs pictures into array_record files, for fast random access on disks and in buckets.

    python -m var_jax.data.prepare --source DIR --out imagenet

DIR holds the tars of ILSVRC 2012 as image-net.org distributes them (and the devkit, unless
tensorflow-datasets is installed), or a tree of class folders; or it is any other `data.source` of
encoded pictures. Then `--config.data.source=imagenet`. No file is decoded or changed. A stopped
command goes on where it was.
"""

from collections.abc import Iterator

from absl import flags
from etils import epath

from var_jax import BadInput
from var_jax.data.encoded import PICTURES, Encoded, open_encoded
from var_jax.data.records import (
    Records,
    checksum,
    claim,
    finish,
    finished,
    shard_size,
    write_shard,
)  # fmt: skip
from var_jax.tools import cli
from var_jax.tools.logs import progress

SOURCE = flags.DEFINE_string("source", None, "Tars, class folders or tfds:NAME.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to write, local or gs://.", required=True)


def main(argv: list[str]) -> None:
    """Packs both splits."""
    cli.no_arguments(argv)
    if SOURCE.value == "emoji" or SOURCE.value.endswith(".npz"):
        raise BadInput(f"--source={SOURCE.value} needs no packing; it is a data.source as it is.")
    splits = {split: open_encoded(SOURCE.value, split) for split in ("train", "validation")}
    out = epath.Path(OUT.value)
    pack(splits, out)
    counts = " and ".join(f"{len(source)} {split}" for split, source in splits.items())
    print(f"{counts} pictures of {len(splits['train'].class_names)} classes are in {out}")


def pack(splits: dict[str, Encoded], out: epath.Path) -> None:
    """Writes the shards that are not there yet, then the manifest.

    Raises: BadInput if `out` holds something else.
    """
    counts = {split: len(source) for split, source in splits.items()}
    if len({source.class_names for source in splits.values()}) > 1:
        raise BadInput("the splits of --source have different classes.")
    manifest = {
        "kind": PICTURES,
        "counts": counts,
        "checksum": {split: checksum(source) for split, source in splits.items()},
        "shard_size": shard_size(max(counts.values())),
        "class_names": list(splits["train"].class_names),
    }
    claim(out, manifest)
    records = {
        split: Records(str(out), split, counts[split], manifest["shard_size"]) for split in splits
    }
    todo = [(split, shard) for split in splits for shard in records[split].missing()]
    if not todo and finished(out):
        return
    left = sum(len(records[split].rows(shard)) for split, shard in todo)
    with progress(sum(counts.values()), sum(counts.values()) - left, "packing") as bar:
        for split, shard in todo:
            rows = records[split].rows(shard)
            write_shard(records[split].path(shard), packed(splits[split], rows, bar))
    finish(out, manifest)


def packed(source: Encoded, rows: range, bar) -> Iterator[bytes]:
    """The records of some pictures, as `PictureRecords` reads them."""
    for row in rows:
        data, label, name = source[row]
        name = "/".join(name.splitlines()[0].split("/")[-2:])  # class folder and file
        yield f"{label} {name}\n".encode() + data
        bar.update()


if __name__ == "__main__":
    cli.run(main)
