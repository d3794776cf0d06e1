"""Models at another schedule of scales than they were trained at.

Weights are shared; positions are interpolated. A transformer trained so goes on from there; one
that is not is sampled at scales that it never saw, as FlexVAR (arXiv 2502.20313) does with a model
made for it.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from var_jax.config import PER_SCALE, SamplingConfig, TokenizerConfig, parse_guidance
from var_jax.models.backbone import Backbone
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.resize import bicubic_matrix
from var_jax.models.tokenizer import Tokenizer
from var_jax.schedule import Schedule, shapes, slices
from var_jax.sharding.mesh import to_host
from var_jax.tools.trees import path_name


def tokenizer_at(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """`tokenizer` at the schedule of `config`: a phi for each scale is that of the nearest one."""
    abstract = jax.eval_shape(lambda: make_tokenizer(config, rngs=nnx.Rngs(0)))
    given = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tokenizer)}

    def pick(path: tuple, wanted: jax.ShapeDtypeStruct) -> Any:
        leaf = given[path_name(path)]
        if len(leaf) == len(wanted):
            return leaf
        return leaf[matching_scales(len(leaf), len(wanted))]

    return jax.tree_util.tree_map_with_path(pick, abstract)


def transformer_at(transformer: Backbone, patch_nums: Schedule) -> Backbone:
    """`transformer` at another schedule: positions resized, levels of the nearest scale.

    A window stays the same number of scales.

    Call it under `jax.set_mesh` where the weights lie on a mesh. Raises: BadInput if that is no
    schedule.
    """
    config = dataclasses.replace(transformer.config, patch_nums=patch_nums)
    config.check()
    given = transformer.config.patch_nums

    def pick(path: tuple, leaf: Any) -> Any:
        match path_name(path):
            case "pos_embed":
                value = resize_positions(np.asarray(to_host(leaf), np.float32), given, patch_nums)
            case "level_embed":
                value = np.asarray(to_host(leaf))[matching_scales(len(given), len(patch_nums))]
            case _:
                return leaf
        value = value.astype(leaf.dtype)
        if isinstance(leaf, np.ndarray):
            return value
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda i: value[i])

    result = jax.tree_util.tree_map_with_path(pick, transformer)
    result.config = config
    return result


def sampling_at(settings: SamplingConfig, given: Schedule, wanted: Schedule) -> SamplingConfig:
    """`settings` of a schedule for another: what is said for each scale, from the nearest one."""
    several = {name: getattr(settings, name) for name in PER_SCALE}
    nearest = matching_scales(len(given), len(wanted))
    moved = {n: tuple(v[k] for k in nearest) for n, v in several.items() if len(v) == len(given)}
    return dataclasses.replace(
        settings, **moved, guidance=guidance_at(settings.guidance, len(given), len(wanted))
    )


def guidance_at(guidance: Any, given: int, wanted: int) -> Any:
    """`SamplingConfig.guidance`; an interval's ends become the nearest of `wanted` scales."""
    if not isinstance(guidance, str):
        return guidance
    name, numbers = parse_guidance(guidance)
    if name != "interval":
        return guidance
    first, last = (matching_scales(wanted, given)[int(number) - 1] + 1 for number in numbers)
    return f"interval={first}-{last}"


def matching_scales(given: int, wanted: int) -> Int[np.ndarray, " wanted"]:
    """For each of `wanted` scales the one of `given` at the nearest place in the schedule."""
    return np.rint(np.linspace(0, given - 1, wanted)).astype(int)


def resize_positions(
    pos_embed: Float[np.ndarray, "L D"], given: Schedule, wanted: Schedule
) -> Float[np.ndarray, "M D"]:
    """Position embeddings of another schedule, each scale resized bicubically from its match."""
    parts, places, known = [], slices(given), shapes(given)
    for shape, k in zip(shapes(wanted), matching_scales(len(given), len(wanted)), strict=True):
        grid = pos_embed[places[k]].reshape(*known[k], -1)
        rows, columns = map(bicubic_matrix, known[k], shape)
        resized = np.einsum("Hh,hwD,Ww->HWD", rows, grid, columns)
        parts.append(resized.reshape(-1, grid.shape[-1]))
    return np.concatenate(parts)
