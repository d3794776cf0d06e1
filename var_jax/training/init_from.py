"""Step 0 from the weights of an export, where classes, schedule and vocabulary may differ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from var_jax import BadInput
from var_jax.checkpoints.export import export_config
from var_jax.config import TransformerConfig
from var_jax.models.backbone import Backbone
from var_jax.models.resize import bicubic_matrix
from var_jax.models.tokenizer import Tokenizer
from var_jax.sampling.exports import abstract_models, load_parts
from var_jax.schedule import Schedule, shapes, slices
from var_jax.sharding.mesh import to_host
from var_jax.tools.trees import path_name

SAME = ("kind", "depth", "width", "num_heads", "mlp_ratio", "qk_norm", "adaln", "shared_adaln")
OF_LATENTS = ("latent_dim", "patch_size")
OF_VOCABULARY = ("head", "head_bias", "word")


def transformer_from(fresh: Backbone, directory: str, class_names: tuple[str, ...]) -> Backbone:
    """`fresh`, whose leaves lie on the mesh, with the weights of the export in `directory`.

    - Classes: a class of the same name keeps its embedding, and so does "no class"; others start
      fresh.
    - Schedule or resolution: positions are interpolated from the scale at the same place in the
      schedule, embeddings of levels from the nearest.
    - Vocabulary: with another number of codes the head starts fresh, with another width of them
      the input layer; of a raster-scan model both, whose input layer has a row for each code.

    Raises: BadInput as `check_source`.
    """
    check_source(directory, fresh.config)
    old: Backbone = load_parts(directory)[0]["transformer"]
    old_names = tuple(export_config(directory)["class_names"])
    if jax.process_index() == 0:
        known = sum(name in old_names for name in class_names)
        print(f"{directory} knows {known} of the {len(class_names)} classes", flush=True)
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(old)}
    sides = old.config.patch_nums, fresh.config.patch_nums
    if sides[0] != sides[1] and "pos_embed" in given:
        given["pos_embed"] = resize_positions(np.asarray(given["pos_embed"], np.float32), *sides)
    if sides[0] != sides[1] and "level_embed" in given:
        levels = matching_scales(*map(len, sides))
        given["level_embed"] = np.asarray(given["level_embed"])[levels]

    def place(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        value = given[name]
        if name == "class_embed":
            value = matched_classes(to_host(leaf), value, old_names, class_names)
        if name in OF_VOCABULARY and value.shape != leaf.shape:
            return leaf
        value = np.asarray(value, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(place, fresh)


def tokenizer_from(fresh: Tokenizer, given: Tokenizer) -> Tokenizer:
    """`given`, for the schedule of `fresh`: its phis, where each scale has one, from the nearest.

    Both lie on the mesh; the weights are copies.
    """
    old = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(given)}

    def place(path: tuple, leaf: Array) -> Array:
        value = old[path_name(path)]
        if len(value) != len(leaf):
            value = value[matching_scales(len(value), len(leaf))]
        return jnp.copy(value)

    return jax.tree_util.tree_map_with_path(place, fresh)


def check_source(directory: str, wanted: TransformerConfig) -> None:
    """Raises BadInput if an export holds no transformer, or one of another depth, width or kind."""
    found = abstract_models(directory)[2].get("transformer")
    if found is None:
        raise BadInput(f"init_from={directory} holds no transformer to start from.")
    for name in SAME + (OF_LATENTS if wanted.kind == "dit" else ()):
        ours, theirs = getattr(wanted, name), getattr(found.config, name)
        if ours != theirs:
            raise BadInput(
                f"init_from={directory} holds a transformer with {name}={theirs}, but"
                f" config.transformer.{name} is {ours}."
            )


def matched_classes(
    fresh: Float[np.ndarray, "A D"],
    given: Float[np.ndarray, "B D"],
    given_names: tuple[str, ...],
    names: tuple[str, ...],
) -> Float[np.ndarray, "A D"]:
    """The table of class embeddings, its last row "no class": rows of the same name, else fresh."""
    rows = {name: row for name, row in zip(given_names, given[:-1], strict=True)}
    kept = [rows.get(name, row) for name, row in zip(names, fresh[:-1], strict=True)]
    return np.stack([*kept, given[-1]])


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
