"""What an encoder in bfloat16 changes: the share of tokens that differ, and the loss on both.

    python benchmarks/encoder_dtype.py --checkpoint emoji --source emoji

Encodes the validation set of --source in float32 and in bfloat16, and prints, for each scale, the
share of tokens that differ; then the PSNR of both reconstructions and the transformer's loss on
both. On a CPU bfloat16 is emulated: the rounding is the same, the speed is not.
"""

import functools
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import var_jax
from var_jax.data.sources import open_source
from var_jax.evaluation.pixel_report import arrays
from var_jax.evaluation.scores import psnr
from var_jax.models.tokenizer import decode_tokens, encode
from var_jax.schedule import lengths, name_of
from var_jax.sharding.ops import data_parallel
from var_jax.sharding.rows import in_batches
from var_jax.tools import cli


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("checkpoint", "emoji", "As of `sample`.")
    flags.DEFINE_string("source", "emoji", "A data source.")
    flags.DEFINE_integer("num", 1000, "Images of its validation set, at most.", 1)


def main(args: flags.FlagValues) -> None:
    """Prints the shares and the figures."""
    model = var_jax.load(args.checkpoint)
    images, labels = arrays(open_source(args.source, "validation", model.image_size, resize=1.0))
    images, labels = images[: args.num], labels[: args.num]
    tokens = {dtype: encoded(model, images, dtype) for dtype in ("float32", "bfloat16")}
    changed = (tokens["float32"] != tokens["bfloat16"]).mean(axis=0)
    parts = np.split(changed, list(accumulate(lengths(model.patch_nums)))[:-1])
    for sides, part in zip(model.patch_nums, parts, strict=True):
        print(f"scale {name_of(sides)}: {part.mean():.2%} of the tokens differ")
    print(f"all scales: {changed.mean():.2%}")
    for dtype, each in tokens.items():
        again = in_batches(decode_tokens, model.models.tokenizer, each)
        loss = -model.log_likelihood(each, labels).sum() / each.size
        print(f"{dtype}: PSNR {psnr(images, again).mean():.3f} dB, loss {loss:.4f} nats a token")


def encoded(model: var_jax.Model, images: np.ndarray, dtype: str) -> np.ndarray:
    """Tokens (N, L), the encoder's activations in `dtype`."""
    run = jax.jit(data_parallel(functools.partial(encode, dtype=jnp.dtype(dtype))))
    first = lambda tokenizer, batch: run(tokenizer, batch)[0]
    return in_batches(first, model.models.tokenizer, images)


if __name__ == "__main__":
    cli.run(main, define_flags)
