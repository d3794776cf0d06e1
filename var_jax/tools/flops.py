"""Analytic operation counts: a multiplication and an addition are two operations."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from var_jax.config import TrainTransformerConfig, TransformerConfig
from var_jax.schedule import Stage

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
TIME = 256  # sines and cosines that a DiT reads the time as


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

    Weights that every token meets count for all tokens, AdaLN's and those of a DiT's time for one;
    attention counts the pairs that a token may see. Input layers count with the blocks.
    """
    D, F, L = config.width, round(config.width * config.mlp_ratio), sum(config.blocks)
    C, V, patch = config.latent_dim, config.vocab_size, config.patch_size**2 * config.latent_dim
    ends = {"var": (C, V), "raster": (0, V), "dit": (patch, patch)}  # a look-up has no product
    read, predicted = ends[config.kind]
    by_token = config.depth * (4 * D * D + 2 * D * F) + read * D
    adaln = 6 * D * D * (1 if config.shared_adaln else config.depth) * config.adaln
    time = (TIME * D + D * D) * (config.kind == "dit")
    return {
        "blocks": 2 * (by_token * L + adaln + time),
        "attention": 4 * config.depth * D * config.pattern.pairs,
        "head": 2 * (D * predicted * L + 2 * D * D * config.adaln),
    }


def at_stage(config: TransformerConfig, stage: Stage) -> TransformerConfig:
    """The model as a stage of progressive training trains it."""
    return dataclasses.replace(config, patch_nums=config.patch_nums[: stage.scales])


def training_totals(
    config: TransformerConfig, training: TrainTransformerConfig, steps: int
) -> dict[str, int]:
    """Tokens of the first `steps` steps, and their matrix products by part, backward included."""
    stages = training.stages(config)
    ends = [*(stage.start for stage in stages[1:]), max(steps, training.steps)]
    totals: dict[str, int] = {}
    for stage, end in zip(stages, ends, strict=True):
        images = max(min(end, steps) - stage.start, 0) * training.batch_size
        model = at_stage(config, stage)
        times = 3 * training.passes  # the backward pass counts twice
        of_image = {f"{part}_flops": times * n for part, n in flops_by_part(model).items()}
        for name, count in (of_image | {"tokens": model.num_tokens}).items():
            totals[name] = totals.get(name, 0) + count * images
    return totals


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
