"""How much memory sampling takes, for a model of the paper's family, without any weights.

    python benchmarks/sampling_memory.py [--depth 30] [--batch_size 64] [--dtype bfloat16]

The parts are arithmetic. The total is XLA's own account of the compiled sampler, for one device of
the platform that this runs on: temporaries hold the cache and whatever else is alive with it.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.models.load import slim
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.sampling.autoregressive import image_keys, sample

GB = 1e9


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    config = TransformerConfig.from_depth(args.depth, dtype=args.dtype)
    codes = dataclasses.replace(TokenizerConfig(), patch_nums=config.patch_nums)
    tokenizer = jax.eval_shape(lambda: Tokenizer(codes, rngs=nnx.Rngs(0)))
    transformer = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    if args.dtype == "bfloat16":
        transformer = slim(transformer)
    both, last = 2 * args.batch_size, config.patch_nums[-1] ** 2
    cache = jax.eval_shape(lambda: transformer.empty_cache(both))
    pixels = args.batch_size * (config.patch_nums[-1] * codes.downsample) ** 2
    parts = {
        f"transformer, {args.dtype}": size(transformer),
        "tokenizer, float32": size(tokenizer),
        "cached keys and values": size(cache),
        "attention weights of the last scale": 4
        * both
        * config.num_heads
        * last
        * config.num_tokens,
        "logits of the last scale": 4 * both * last * config.vocab_size,
        "one activation of the tokenizer's last level": 4 * pixels * codes.channels,
    }
    print(f"d{args.depth}, batch {args.batch_size} (twice that with guidance)")
    for name, count in parts.items():
        print(f"{name:48s} {count / GB:7.2f} GB")
    labels = jax.ShapeDtypeStruct((args.batch_size,), jnp.int32)
    keys = jax.eval_shape(lambda: image_keys(0, jnp.arange(args.batch_size)))
    started = time.monotonic()
    compiled = sample.lower(transformer, tokenizer, labels, keys, cfg=1.5).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    seconds = time.monotonic() - started
    taken = {
        "weights and other arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "images and tokens": memory.output_size_in_bytes,
    }
    print(f"compiled for {jax.default_backend()} in {seconds:.0f} s")
    for name, count in (taken | {"total": sum(taken.values())}).items():
        print(f"{name:48s} {count / GB:7.2f} GB")


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
