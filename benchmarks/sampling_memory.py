"""Memory that sampling takes, for a model of the paper's family, without any weights.

    python benchmarks/sampling_memory.py [--depth 30] [--batch_size 64] [--dtype bfloat16]

Weights and cache are arithmetic; the rest is XLA's account of the sampler compiled for one device
of this platform.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.sampling.autoregressive import Weights, sample
from var_jax.sampling.exports import build, in_bfloat16
from var_jax.sampling.generate import image_keys


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    config = TransformerConfig.from_depth(args.depth, dtype=args.dtype)
    transformer = build(config)
    if args.dtype == "bfloat16":
        transformer = in_bfloat16(transformer)
    tokenizer = build(dataclasses.replace(TokenizerConfig(), patch_nums=config.patch_nums))
    scales = len(config.patch_nums)
    labels = jax.ShapeDtypeStruct((args.batch_size,), jnp.int32)
    keys = jax.eval_shape(lambda: image_keys(0, jnp.arange(args.batch_size)))
    compiled = sample.lower(Weights(tokenizer, transformer), labels, keys).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    parts = {
        "transformer": size(transformer),
        "tokenizer": size(tokenizer),
        "cached keys and values": size(
            jax.eval_shape(lambda: transformer.cache_for(2 * args.batch_size, scales))
        ),
        "temporaries, the cache among them": memory.temp_size_in_bytes,
        "total": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes,
    }
    print(f"d{args.depth}, {args.dtype}, batch {args.batch_size} (twice that with guidance)")
    for name, count in parts.items():
        print(f"{name:36s} {count / 1e9:7.2f} GB")


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
