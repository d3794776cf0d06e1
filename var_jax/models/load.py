"""Builds the models of an export, and writes them to one."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import PartitionSpec

from var_jax import BadInput
from var_jax.checkpoints.export import find_export, load_config, load_weights, save_export
from var_jax.config import Config, SamplingConfig, TokenizerConfig, TransformerConfig, from_dict
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.sharding.mesh import shard
from var_jax.training.state import layout

T = TypeVar("T")


class Models(NamedTuple):
    """What a checkpoint holds."""

    tokenizer: Tokenizer
    transformer: Transformer
    class_names: tuple[str, ...]
    sampling: SamplingConfig

    def class_index(self, label: str, flag: str) -> int:
        """A class by number or by name. Raises: BadInput, naming `flag`, if there is none such."""
        names = self.class_names
        if re.fullmatch("-?[0-9]+", label):
            if 0 <= int(label) < len(names):
                return int(label)
            raise BadInput(f"{flag} holds {label}; classes are 0 to {len(names) - 1}.")
        found = [i for i, name in enumerate(names) if name.lower() == label.lower()]
        if not found:
            some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise BadInput(f"{flag} holds {label!r}; the classes of this checkpoint are {some}.")
        return found[0]

    def drawn(self, cfg: float | None, top_k: int | None, top_p: list[str] | None) -> "Models":
        """To be drawn from as the flags say and, where those are None, as the checkpoint does.

        Raises: BadInput if `top_p` is not of numbers from 0 to 1, one or one for each scale.
        """
        given: dict[str, Any] = {"cfg": cfg, "top_k": top_k}
        if top_p is not None:
            try:
                given["top_p"] = tuple(map(float, top_p))
            except ValueError as error:
                raise BadInput(f"--top_p={','.join(top_p)}; expected numbers.") from error
        given = {name: value for name, value in given.items() if value is not None}
        sampling = dataclasses.replace(self.sampling, **given)
        sampling.check(self.transformer.config.patch_nums)
        return self._replace(sampling=sampling)


def save_models(
    directory: str | PurePath, parts: dict[str, Any], class_names: Sequence[str], config: Config
) -> None:
    """Writes a checkpoint of `tokenizer` and maybe `transformer`, as `config` trained them."""
    parts = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.export_dtype)), parts)
    trained = {"seed": config.seed, "data": dataclasses.asdict(config.data)}
    if not config.pretrained_tokenizer:
        trained["train_tokenizer"] = dataclasses.asdict(config.train_tokenizer)
    if "transformer" in parts:
        trained["train_transformer"] = dataclasses.asdict(config.train_transformer)
    save_parts(directory, parts, class_names, config.sampling, trained=trained)


def rounded(parts: T, dtype: str) -> T:
    """Weights as `save_models` stores them in `dtype` and `load_models` reads them."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)).astype(leaf.dtype), parts)


def save_parts(
    directory: str | PurePath,
    parts: dict[str, Any],
    class_names: Sequence[str],
    sampling: SamplingConfig,
    torch_buffers: dict[str, np.ndarray] | None = None,
    trained: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint of `tokenizer` and maybe `transformer`, weights as they are.

    `torch_buffers` are tensors of a PyTorch file that only matter on the way back, `trained` tells
    how the weights came about.
    """
    buffers = torch_buffers or {}
    configs = {name: dataclasses.asdict(model.config) for name, model in parts.items()}
    about = {
        **configs,
        "class_names": list(class_names),
        "sampling": dataclasses.asdict(sampling),
        "torch_buffers": {name: list(array.shape) for name, array in buffers.items()},
    }
    if trained:
        about["trained"] = trained
    save_export(directory, parts | {"torch_buffers": buffers}, about)


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

    Raises: BadInput if there is none, it is damaged, or holds a tokenizer only.
    """
    folder, about, abstract = describe(directory, dtype)
    if "transformer" not in abstract:
        raise BadInput(
            f"{folder} holds a tokenizer but no transformer; convert it with --transformer too."
        )
    how = section(SamplingConfig, about, "sampling", folder)
    if dtype == "bfloat16":
        abstract["transformer"] = slim(abstract["transformer"])
    abstract = {
        "tokenizer": shard(abstract["tokenizer"], mesh, lambda path, leaf: PartitionSpec()),
        "transformer": shard(abstract["transformer"], mesh, layout),
    }
    weights = load_weights(folder, abstract)
    return Models(weights["tokenizer"], weights["transformer"], tuple(about["class_names"]), how)


def load_tokenizer(directory: str, mesh: jax.sharding.Mesh) -> Tokenizer:
    """Reads the tokenizer of a checkpoint, on every device of the mesh, weights in float32.

    Raises: BadInput if there is none, or it is damaged.
    """
    folder, _, abstract = describe(directory)
    whole = shard(abstract["tokenizer"], mesh, lambda path, leaf: PartitionSpec())
    return load_weights(folder, {"tokenizer": whole})["tokenizer"]


def load_parts(directory: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`parts` and `torch_buffers` of `save_parts` as NumPy arrays, in the dtypes they were saved.

    Raises: BadInput if there is no checkpoint, or it is damaged.
    """
    folder, about, abstract = describe(directory)
    buffers = about.get("torch_buffers", {})
    kept = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in buffers.items()}
    parts = load_weights(folder, {**abstract, "torch_buffers": kept}, as_stored=True)
    return parts, parts.pop("torch_buffers")


def describe(directory: str, dtype: str = "auto") -> tuple[epath.Path, dict, dict[str, Any]]:
    """The folder, its config.json, and its models with abstract weights.

    Another `dtype` than "auto" replaces the one that the transformer computes in.

    Raises: BadInput if it is no checkpoint.
    """
    folder, about = find_export(directory), load_config(directory)
    if not isinstance(about.get("tokenizer"), dict) or "class_names" not in about:
        raise BadInput(f"{folder}/config.json describes no tokenizer; expected a checkpoint.")
    models = {"tokenizer": build(section(TokenizerConfig, about, "tokenizer", folder))}
    if "transformer" in about:
        config = section(TransformerConfig, about, "transformer", folder)
        if dtype != "auto":
            config = dataclasses.replace(config, dtype=dtype)
        models["transformer"] = build(config)
    return folder, about, models


def build(config: TokenizerConfig | TransformerConfig) -> Any:
    """The model of a config, with abstract weights."""
    model = Tokenizer if isinstance(config, TokenizerConfig) else Transformer
    return jax.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


def section(cls: type[T], about: dict, name: str, folder: PurePath) -> T:
    """A section of config.json in `folder`. Raises: BadInput, naming the file."""
    try:
        return from_dict(cls, about.get(name, {}), name)
    except BadInput as error:
        raise BadInput(f"{folder}/config.json: {error}") from None
