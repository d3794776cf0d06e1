"""Analytic operation counts: a multiplication and an addition are two operations."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from var_jax.config import TransformerConfig
from var_jax.schedule import slices

# Dense bfloat16 operations a second, from the makers' data sheets, by how jax names the device.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """What a device could do at most; None where it is not known."""
    fits = [name for name in PEAKS if name in device_kind]
    return PEAKS[max(fits, key=len)] if fits else None


def transformer_flops(config: TransformerConfig, *, backward: bool = True) -> int:
    """Matrix products of one image's forward pass, three times that with the backward pass.

    Nothing recomputed is counted.
    """
    return sum(flops_by_part(config).values()) * (3 if backward else 1)


def flops_by_part(config: TransformerConfig) -> dict[str, int]:
    """Matrix products of one image's forward pass: in the blocks, their attention, and the head.

    Weights that every token meets count for L tokens, AdaLN's for one; attention counts the pairs
    that a token may see.
    """
    D, F, L = config.width, round(config.width * config.mlp_ratio), config.num_tokens
    by_token = config.depth * (4 * D * D + 2 * D * F) + config.latent_dim * D
    adaln = 6 * D * D * (1 if config.shared_adaln else config.depth)
    pairs = sum(s.stop * (s.stop - s.start) for s in slices(config.patch_nums))
    return {
        "blocks": 2 * (by_token * L + adaln),
        "attention": 4 * config.depth * D * pairs,
        "head": 2 * (D * config.vocab_size * L + 2 * D * D),
    }


def matmul_flops(f: Callable[..., Any], *args: Any) -> int:
    """Operations of the matrix products and convolutions of `f(*args)`; args may be abstract."""
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * out * math.prod(shape[axis] for axis in summed)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * out * math.prod(kernel) // kernel[features]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(_count(inner) for inner in jaxprs_in_params(equation.params))
    return total
