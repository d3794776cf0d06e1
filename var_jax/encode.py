"""Turns pictures into the codes of a checkpoint's tokenizer.

    python -m var_jax.encode --checkpoint d16 --images imagenet --out tokens [--copies 10]

writes a token cache of FOLDER, tfds:NAME or "emoji", whatever `data.source` may be: array_record
files and manifest.json, for `--config.data.tokens=tokens`. Training then sees the crops that it
would have cut itself in its first epochs (--copies of them), and those again. A stopped command
goes on where it was. Hosts that share the folder share the work where all run it with
--distributed.

    python -m var_jax.encode --checkpoint d16 --images images.npz --out tokens

reads `arr_0`, uint8 (N,H,W,3), of the size that the tokenizer was made for, and writes tokens.npz:
`tokens`, int32 (N,L), coarse scale first. With --cache it becomes a token cache, too, if it has the
`labels` of a `data.source`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import AxisType, Mesh
from jaxtyping import Int32

from var_jax import BadInput
from var_jax.checkpoints.export import load_tokenizer
from var_jax.data.sources import ImageSource, open_source
from var_jax.data.token_cache import encode, records_of, write_cache
from var_jax.models.tokenizer import Tokenizer
from var_jax.sharding import hosts
from var_jax.sharding.mesh import AXES, check_batch, make_mesh
from var_jax.sharding.ops import BATCH, pin, round_up
from var_jax.tools import cli
from var_jax.tools.logs import progress
from var_jax.tools.npz import Images, save_npz

CHECKPOINT = flags.DEFINE_string("checkpoint", None, 'A folder, or "emoji".', required=True)
IMAGES = flags.DEFINE_string("images", None, "A folder, tfds:NAME or an npz.", required=True)
CACHE = flags.DEFINE_bool("cache", False, "Make a token cache of an npz, too.")
COPIES = flags.DEFINE_integer("copies", 1, "Random crops of each training picture.", 1)
RESIZE = flags.DEFINE_float("resize", 1.125, "Shorter edge ahead of the crop, in image sizes.", 1)
FLIP = flags.DEFINE_bool("flip", False, "Mirror half of them (of the emoji no symbols and flags).")
SHIFT = flags.DEFINE_integer("shift", 0, "Move them by up to so many pixels.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Of the crops, as config.seed.", 0, 2**32 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.", 1)
OUT = flags.DEFINE_string("out", "tokens", "Folder to write.")
flags.adopt_module_key_flags(hosts)


def main(argv: list[str]) -> None:
    """One of the two."""
    cli.no_arguments(argv)
    if IMAGES.value.endswith(".npz") and not CACHE.value:
        if hosts.several():
            raise BadInput(f"--distributed: {IMAGES.value} is one host's work; caches are shared.")
        for flag in (COPIES, RESIZE, FLIP, SHIFT, SEED):
            if flag.value != flag.default:
                raise BadInput(
                    f"--{flag.name} is for a token cache; an npz becomes one by --cache."
                )
        encode_npz()
    else:
        cache()


def encode_npz() -> None:
    """Writes the codes of an npz of images."""
    images = Images(IMAGES.value)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(CHECKPOINT.value, mesh)
        side = tokenizer.config.patch_nums[-1] * tokenizer.config.downsample
        if images.shape[1:3] != (side, side):
            raise BadInput(
                f"{IMAGES.value} holds images of {images.shape[1]} x {images.shape[2]} pixels; the"
                f" tokenizer of {CHECKPOINT.value} is for {side} x {side}."
            )
        tokens = tokenize(tokenizer, images, BATCH_SIZE.value)
    path = epath.Path(OUT.value) / "tokens.npz"
    save_npz(path, tokens=tokens)
    print(f"{len(tokens)} x {tokens.shape[1]} tokens are in {path}")


def tokenize(tokenizer: Tokenizer, images: Images, batch_size: int) -> Int32[np.ndarray, "N L"]:
    """The codes of all images; the last batch is padded, so that one program serves all."""
    size, parts = round_up(batch_size), []
    with progress(images.shape[0], 0, "tokenizing") as bar:
        for batch in images.batches(batch_size):
            padded = np.resize(batch, (size, *batch.shape[1:]))
            tokens = encode(tokenizer, pin(jnp.asarray(padded), BATCH))
            parts.append(np.asarray(tokens)[: len(batch)])
            bar.update(len(batch))
    return np.concatenate(parts)


def cache() -> None:
    """Writes the token cache of both splits."""
    hosts.join()
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 3)
    check_batch("--batch_size", BATCH_SIZE.value, mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(CHECKPOINT.value, mesh)
        size = tokenizer.config.patch_nums[-1] * tokenizer.config.downsample
        sources = {
            split: open_source(IMAGES.value, split, size, RESIZE.value)
            for split in ("train", "validation")
        }
        out = epath.Path(OUT.value)
        manifest = write_cache(
            tokenizer, sources, out, mesh=mesh, batch_size=BATCH_SIZE.value, copies=COPIES.value,
            seed=SEED.value, flip=FLIP.value, shift=SHIFT.value,
            about={"source": IMAGES.value, "size": size, "resize": RESIZE.value},
        )  # fmt: skip
    parts = {split: records_of(manifest, str(out), split) for split in sources}
    if left := sum(len(records.missing()) for records in parts.values()):
        print(f"this host is done; {left} shards are left to the others, or to the same command")
        return
    size = sum(path.stat().length for path in out.iterdir())
    crops, pictures = sum(map(len, parts.values())), sum(map(len, sources.values()))
    print(f"codes of {crops} crops of {pictures} pictures, {size / 1e6:.1f} MB, are in {out}")
    skipped = sum(len(s.skipped) for s in sources.values() if isinstance(s, ImageSource))
    if skipped:
        print(f"{skipped} pictures could not be read; the next one stands in for each")


if __name__ == "__main__":
    cli.run(main)
