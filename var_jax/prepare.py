"""Packs images into array_record files, for fast random access on disks and in buckets.

    python -m var_jax.prepare --source DIR --out imagenet

DIR holds the tars of ILSVRC 2012 as image-net.org distributes them (and the devkit, unless
tensorflow-datasets is installed), or a tree of class folders; or it is any other `data.source` of
encoded images. Then `--config.data.source=imagenet`. No file is decoded or changed. A stopped
command continues where it was.
"""

from absl import flags

from var_jax import BadInput
from var_jax.data.inventory import summarize
from var_jax.data.sources import SPLITS, open_encoded
from var_jax.data.sources.packed import pack
from var_jax.tools import cli
from var_jax.tools.files import output_folder


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Tars, class folders or tfds:NAME.", required=True)
    flags.DEFINE_string("out", None, "Folder to write, local or gs://.", required=True)


def main(args: flags.FlagValues) -> None:
    """Packs both splits."""
    if args.source == "emoji" or args.source.endswith(".npz"):
        raise BadInput(f"--source={args.source} needs no packing; it is a data.source as it is.")
    out = output_folder(args.out)
    splits = {split: open_encoded(args.source, split) for split in SPLITS}
    print(summarize(args.source, splits), flush=True)
    pack(splits, out)
    counts = " and ".join(f"{len(images)} {split}" for split, images in splits.items())
    print(f"{counts} images of {len(splits['train'].class_names)} classes are in {args.out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
