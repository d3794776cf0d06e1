"""Packs images into array_record files, for fast random access on disks and in buckets.

    python -m var_jax.prepare --source DIR --out imagenet

DIR holds the tars of ILSVRC 2012 as image-net.org distributes them (and the devkit, unless
tensorflow-datasets is installed), or a tree of class folders; or it is any other `data.source` of
encoded images. Then `--config.data.source=imagenet`. No file is decoded or changed. A stopped
command continues where it was.

    python -m var_jax.prepare --source idx:/usr/share/datasets/fashion-mnist --tfds fashion_mnist \\
        --out ~/tensorflow_datasets

makes the set `tfds:fashion_mnist` of the four IDX files, without TensorFlow and a download.
"""

import re

from absl import flags

from var_jax import BadInput
from var_jax.data.inventory import summarize
from var_jax.data.sources import SPLITS, open_encoded
from var_jax.data.sources.packed import pack
from var_jax.data.sources.tfds import prepare_idx
from var_jax.tools import cli
from var_jax.tools.files import output_folder
from var_jax.tools.npz import is_npz


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Tars, class folders or tfds:NAME.", required=True)
    flags.DEFINE_string("out", None, "Folder to write, local or gs://.", required=True)
    flags.DEFINE_string("tfds", None, "Write idx:DIR as the set tfds:NAME of this name.")


def main(args: flags.FlagValues) -> None:
    """Packs both splits."""
    if args.tfds:
        prepare_tfds(args)
        return
    if args.source == "emoji" or is_npz(args.source) or args.source.startswith("idx:"):
        raise BadInput(f"--source={args.source} needs no packing; it is a data.source as it is.")
    out = output_folder(args.out)
    splits = {split: open_encoded(args.source, split) for split in SPLITS}
    print(summarize(args.source, splits), flush=True)
    pack(splits, out)
    counts = " and ".join(f"{len(images)} {split}" for split, images in splits.items())
    print(f"{counts} images of {len(splits['train'].class_names)} classes are in {args.out}")


def prepare_tfds(args: flags.FlagValues) -> None:
    """Writes a set that tfds reads."""
    if not args.source.startswith("idx:"):
        raise BadInput(f"--tfds is for --source=idx:DIR, which {args.source} is not.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.tfds):
        raise BadInput(f"--tfds={args.tfds!r}; expected a name like fashion_mnist.")
    prepare_idx(args.tfds, args.source.removeprefix("idx:"), str(output_folder(args.out)))
    print(f"tfds:{args.tfds} is in {args.out}; read it with TFDS_DATA_DIR={args.out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
