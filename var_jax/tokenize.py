"""Turns pictures into the codes of a checkpoint's tokenizer.

    python -m var_jax.tokenize --checkpoint d16 --images imagenet --out tokens [--copies 10]

writes a token cache of FOLDER or tfds:NAME, whatever `data.source` may be: array_record files and
manifest.json, for `--config.data.tokens=tokens`. Training then sees the crops that it would have
cut itself in its first epochs (--copies of them), and those again. A stopped command goes on where
it was; several hosts may run it at once.
"""

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import AxisType, Mesh

from var_jax import BadInput
from var_jax.data.sources import open_source
from var_jax.data.tokens import records_of
from var_jax.infra import cli
from var_jax.infra.mesh import AXES, check_batch
from var_jax.training.export import load_models
from var_jax.training.token_cache import write_cache

CHECKPOINT = flags.DEFINE_string("checkpoint", None, 'A folder, or "emoji".', required=True)
IMAGES = flags.DEFINE_string("images", None, "A folder or tfds:NAME.", required=True)
COPIES = flags.DEFINE_integer("copies", 1, "Random crops of each training picture.", 1)
RESIZE = flags.DEFINE_float("resize", 1.125, "Shorter edge ahead of the crop, in image sizes.", 1)
FLIP = flags.DEFINE_bool("flip", False, "Mirror half of them.")
SHIFT = flags.DEFINE_integer("shift", 0, "Move them by up to so many pixels.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Of the crops, as config.seed.", 0, 2**32 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.", 1)
OUT = flags.DEFINE_string("out", "tokens", "Folder to write.")


def main(argv: list[str]) -> None:
    """Tokenizes shard by shard."""
    cli.no_arguments(argv)
    if IMAGES.value.endswith(".npz"):
        raise BadInput(f"--images={IMAGES.value}: an .npz is not read yet.")
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        cache(mesh)


def cache(mesh: Mesh) -> None:
    """Writes the token cache of both splits."""
    check_batch("--batch_size", BATCH_SIZE.value, mesh)
    tokenizer = load_models(CHECKPOINT.value, mesh).tokenizer
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
    count = sum(map(len, parts.values()))
    print(f"codes of {count} pictures, {size / 1e6:.1f} MB, are in {out}")


if __name__ == "__main__":
    cli.run(main)
