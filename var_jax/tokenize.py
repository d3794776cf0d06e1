"""Turns images into the codes of a checkpoint's tokenizer.

    python -m var_jax.tokenize --checkpoint d16 --images images.npz --out tokens

images.npz holds `arr_0`, uint8 (N,H,W,3), of the size that the tokenizer was made for. Writes
tokens.npz: `tokens`, int32 (N,L), coarse scale first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Int32

from var_jax import BadInput
from var_jax.infra import cli
from var_jax.infra.logs import progress
from var_jax.infra.mesh import make_mesh
from var_jax.infra.npz import Images, save_npz
from var_jax.models.partition import BATCH, pin, round_up
from var_jax.models.tokenizer import Tokenizer
from var_jax.training.export import load_tokenizer
from var_jax.training.tokenizer_stage import to_float

CHECKPOINT = flags.DEFINE_string("checkpoint", None, 'A folder, or "emoji".', required=True)
IMAGES = flags.DEFINE_string("images", None, "An npz of images.", required=True)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.", 1)
OUT = flags.DEFINE_string("out", "tokens", "Folder to write.")


def main(argv: list[str]) -> None:
    """Tokenizes batch by batch."""
    cli.no_arguments(argv)
    if not IMAGES.value.endswith(".npz"):
        raise BadInput(f"--images={IMAGES.value} is no .npz file, the only kind read so far.")
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
    encode = jax.jit(lambda tokenizer, image: tokenizer.encode(to_float(image)))
    size, parts = round_up(batch_size), []
    with progress(images.shape[0], 0, "tokenizing") as bar:
        for batch in images.batches(batch_size):
            padded = np.resize(batch, (size, *batch.shape[1:]))
            tokens = encode(tokenizer, pin(jnp.asarray(padded), BATCH))
            parts.append(np.asarray(tokens)[: len(batch)])
            bar.update(len(batch))
    return np.concatenate(parts)


if __name__ == "__main__":
    cli.run(main)
