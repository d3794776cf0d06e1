"""Step 0 from the weights of an export, where classes, schedule and vocabulary may differ."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from var_jax import BadInput
from var_jax.checkpoints.export import export_config
from var_jax.config import TransformerConfig
from var_jax.models.backbone import Backbone
from var_jax.models.other_schedule import transformer_at
from var_jax.sampling.exports import abstract_models, load_parts
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
    old = transformer_at(old, fresh.config.patch_nums)
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(old)}

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
