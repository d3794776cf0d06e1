"""The self-describing checkpoint that training leaves and every other command reads.

A folder with `config.json` (both model configs, class names) and `weights/`. "emoji" names the one
that ships in the package.
"""

import dataclasses
from importlib import resources
from pathlib import Path, PurePath
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from var_jax import BadInput
from var_jax.config import Config, TokenizerConfig, TransformerConfig, from_dict
from var_jax.infra.checkpoint import load_config, load_weights, save_weights
from var_jax.infra.mesh import shard
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import Transformer
from var_jax.training.state import layout


class Models(NamedTuple):
    """What a checkpoint holds."""

    tokenizer: Tokenizer
    transformer: Transformer
    class_names: tuple[str, ...]

    def class_index(self, label: str, flag: str) -> int:
        """A class by number or by name. Raises: BadInput, naming `flag`, if there is none such."""
        names = self.class_names
        if label.lstrip("-").isdigit():
            if 0 <= int(label) < len(names):
                return int(label)
            raise BadInput(f"{flag} holds {label}; classes are 0 to {len(names) - 1}.")
        found = [i for i, name in enumerate(names) if name.lower() == label.lower()]
        if not found:
            some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise BadInput(f"{flag} holds {label!r}; the classes of this checkpoint are {some}.")
        return found[0]


def save_models(directory: str | PurePath, models: Models, config: Config) -> None:
    """Writes the checkpoint, weights in `config.export_dtype`."""
    weights = {"tokenizer": models.tokenizer, "transformer": models.transformer}
    dtype = jnp.dtype(config.export_dtype)
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
    about = {
        "tokenizer": dataclasses.asdict(config.tokenizer),
        "transformer": dataclasses.asdict(config.transformer),
        "class_names": list(models.class_names),
    }
    save_weights(directory, weights, about)


def slim(transformer: Transformer) -> Transformer:
    """The abstract transformer with its large weights in bfloat16."""
    narrow = lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, jnp.bfloat16 if len(layout(path, leaf)) else leaf.dtype
    )
    return jax.tree_util.tree_map_with_path(narrow, transformer)


def load_models(directory: str, mesh: jax.sharding.Mesh, dtype: str = "auto") -> Models:
    """Reads a checkpoint onto the mesh, weights in float32.

    Another `dtype` than "auto" is what the transformer computes in, and bfloat16 also what its
    large weights are held in: half the memory.

    Raises: BadInput if there is none, or it is damaged.
    """
    folder: str | Path = directory
    bundled = resources.files("var_jax") / "checkpoints" / directory
    if not Path(directory).exists() and "/" not in directory and bundled.is_dir():
        folder = Path(str(bundled))
    about = load_config(folder)
    tokenizer = from_dict(TokenizerConfig, about["tokenizer"], "tokenizer")
    transformer = from_dict(TransformerConfig, about["transformer"], "transformer")
    if dtype != "auto":
        transformer = dataclasses.replace(transformer, dtype=dtype)
    abstract = {
        "tokenizer": jax.eval_shape(lambda: Tokenizer(tokenizer, rngs=nnx.Rngs(0))),
        "transformer": jax.eval_shape(lambda: Transformer(transformer, rngs=nnx.Rngs(0))),
    }
    if dtype == "bfloat16":
        abstract["transformer"] = slim(abstract["transformer"])
    abstract = {
        "tokenizer": shard(abstract["tokenizer"], mesh, lambda path, leaf: PartitionSpec()),
        "transformer": shard(abstract["transformer"], mesh, layout),
    }
    weights = load_weights(folder, abstract)
    return Models(weights["tokenizer"], weights["transformer"], tuple(about["class_names"]))
