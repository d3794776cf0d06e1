"""Turns images into tokens of a checkpoint's tokenizer.

    python -m var_jax.encode --checkpoint d16 --images imagenet --out tokens [--copies 10]

writes a token cache of FOLDER, tfds:NAME or "emoji", whatever `data.source` may be: array_record
files and manifest.json, for `--config.data.tokens=tokens`. Training then sees the crops that it
would have cut itself in its first epochs (--copies of them), and those again. A stopped command
continues. Hosts that share the folder share the work where all run it with --distributed. What a
host that is slow or gone has not done, the others do.

    python -m var_jax.encode --checkpoint d16 --images images.npz --out tokens

reads `arr_0`, uint8 (N,H,W,3), of the size that the tokenizer was made for, and writes tokens.npz:
`tokens`, int32 (N,L), coarse scale first. With --cache it becomes a token cache, too, if it has the
`labels` of a `data.source`.
"""

import jax
import numpy as np
from absl import flags

from var_jax import BadInput
from var_jax.config import MAX_SEED
from var_jax.data.inventory import summarize
from var_jax.data.sources import ImageSource, open_source
from var_jax.data.token_cache import records_of, write_cache
from var_jax.models.tokenizer import encode_images
from var_jax.sampling.exports import load_tokenizer
from var_jax.schedule import name_of, shape_of
from var_jax.sharding import hosts
from var_jax.sharding.mesh import check_batch, data_mesh, make_mesh, using
from var_jax.sharding.rows import in_batches
from var_jax.tools import cli
from var_jax.tools.files import output_folder
from var_jax.tools.logs import progress
from var_jax.tools.npz import NpzImages, is_npz, save_npz

OF_CACHE = ("copies", "resize", "flip", "shift", "seed")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, 'A folder, "emoji" or "hub:d16".', required=True)
    flags.DEFINE_string("images", None, "A folder, tfds:NAME or an npz.", required=True)
    flags.DEFINE_bool("cache", False, "Make a token cache of an npz, too.")
    flags.DEFINE_integer("copies", 1, "Random crops of each training image.", 1, 10_000)
    flags.DEFINE_float("resize", 1.125, "Shorter edge ahead of the crop, in image sizes.", 1)
    flags.DEFINE_bool(
        "flip", False, "Mirror half of the crops (of the emoji no symbols and flags)."
    )
    flags.DEFINE_integer("shift", 0, "Shift crops randomly by at most this many pixels.", 0)
    flags.DEFINE_integer("seed", 0, "Of the crops, as config.seed.", 0, MAX_SEED)
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", 1)
    flags.DEFINE_string("out", "tokens", "Folder to write.")
    hosts.define_flags()


def main(args: flags.FlagValues) -> None:
    """Encodes an npz, or writes a token cache."""
    if not is_npz(args.images) or args.cache:
        return write_token_cache(args)
    if hosts.are_several(args):
        raise BadInput(f"--distributed: {args.images} is one host's work; caches are shared.")
    for name in OF_CACHE:
        if args[name].value != args[name].default:
            raise BadInput(f"--{name} is for a token cache; an npz becomes one by --cache.")
    encode_npz(args)


def encode_npz(args: flags.FlagValues) -> None:
    """Writes the tokens of an npz of images."""
    images, mesh, out = NpzImages(args.images), data_mesh(), output_folder(args.out)
    with using(mesh), progress(images.shape[0], 0, "encoding") as bar:
        tokenizer = load_tokenizer(args.checkpoint, mesh)
        wanted, parts = tokenizer.config.image_size, []
        _, h, w, _ = images.shape
        if (h, w) != shape_of(wanted):
            raise BadInput(
                f"{args.images} holds images of {name_of((h, w))} pixels; the"
                f" tokenizer of {args.checkpoint} is for {name_of(wanted)}."
            )
        size = min(args.batch_size, images.shape[0])
        for batch in images.batches(size):
            padded = np.resize(batch, (size, *batch.shape[1:]))  # one program serves all
            parts.append(in_batches(encode_images, tokenizer, padded, size)[: len(batch)])
            bar.update(len(batch))
    path, tokens = out / "tokens.npz", np.concatenate(parts)
    save_npz(path, tokens=tokens)
    print(f"{len(tokens)} x {tokens.shape[1]} tokens are in {path}")


def write_token_cache(args: flags.FlagValues) -> None:
    """Writes the token cache of both splits; hosts share shards, not batches."""
    host, count_of_hosts = hosts.place(args)
    out = output_folder(args.out, locks=host == 0)  # for all hosts
    hosts.check_shared("--out", out)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.local_devices())
    check_batch("--batch_size", args.batch_size, mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(args.checkpoint, mesh)
        hosts.leave()
        size = tokenizer.config.image_size
        sources = {
            split: open_source(args.images, split, size, args.resize)
            for split in ("train", "validation")
        }
        print(summarize(args.images, sources), flush=True)
        manifest = write_cache(
            tokenizer, sources, out, mesh=mesh, batch_size=args.batch_size, copies=args.copies,
            seed=args.seed, flip=args.flip, shift=args.shift, host=host, hosts=count_of_hosts,
            about={"source": args.images, "size": size, "resize": args.resize},
        )  # fmt: skip
    parts = {split: records_of(manifest, str(out), split) for split in sources}
    size = sum(p.path(i).stat().length for p in parts.values() for i in range(p.shards))
    crops, images = sum(map(len, parts.values())), sum(map(len, sources.values()))
    print(f"codes of {crops} crops of {images} images, {size / 1e6:.1f} MB, are in {out}")
    skipped = sum(len(s.skipped) for s in sources.values() if isinstance(s, ImageSource))
    if skipped:
        print(f"{skipped} images could not be read; the next one stands in for each")


if __name__ == "__main__":
    cli.run(main, define_flags)
