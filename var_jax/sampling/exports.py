"""Builds the models of an export, and writes them to one."""

import dataclasses
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from var_jax import BadInput
from var_jax.checkpoints import hub
from var_jax.checkpoints.export import (
    export_config,
    find_export,
    fingerprint,
    load_weights,
    save_export,
)
from var_jax.checkpoints.torch.convert import read_models
from var_jax.config import (
    MOST,
    MOST_VALUES,
    Config,
    MeshConfig,
    SamplingConfig,
    TokenizerConfig,
    TransformerConfig,
    from_dict,
    settings,
)
from var_jax.data.sources.imagenet import class_names
from var_jax.models.backbone import Backbone
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import make_transformer
from var_jax.sharding.mesh import check_hosts, sampling_mesh, shard

T = TypeVar("T")


class Models(NamedTuple):
    """What an export holds."""

    tokenizer: Tokenizer
    transformer: Backbone
    class_names: tuple[str, ...]
    sampling: SamplingConfig = SamplingConfig()


def build(config: TokenizerConfig | TransformerConfig) -> Any:
    """The model of a config, with abstract weights."""
    model = make_tokenizer if isinstance(config, TokenizerConfig) else make_transformer
    return jax.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


def save_models(
    directory: str | PurePath, parts: dict[str, Any], class_names: Sequence[str], config: Config
) -> None:
    """Writes an export of `tokenizer` and maybe `transformer`, as `config` trained them."""
    parts = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.export_dtype)), parts)
    save_parts(directory, parts, class_names, config.sampling, trained=settings(config))


def save_parts(
    directory: str | PurePath,
    parts: dict[str, Any],
    class_names: Sequence[str],
    sampling: SamplingConfig,
    torch_buffers: dict[str, np.ndarray] | None = None,
    trained: dict[str, Any] | None = None,
) -> None:
    """Writes an export of `tokenizer` and maybe `transformer`, weights as they are.

    `torch_buffers` are tensors of a PyTorch file that only matter on the way back; `trained` is the
    config of the run.
    """
    buffers = torch_buffers or {}
    about = {
        **{name: dataclasses.asdict(model.config) for name, model in parts.items()},
        "class_names": list(class_names),
        "sampling": dataclasses.asdict(sampling),
        "torch_buffers": {name: list(array.shape) for name, array in buffers.items()},
    }
    if trained:
        about["trained"] = trained
    save_export(directory, parts | {"torch_buffers": buffers}, about)


def convert(paths: dict[str, str], directory: str | PurePath, **options: Any) -> dict[str, Any]:
    """Writes an export of PyTorch files (`read_models`, which takes `options`); returns its parts.

    Raises: BadInput, naming file and tensor.
    """
    models, usage = read_models(paths, build, **options)
    known = "transformer" in models
    names = class_names(models["transformer"].config.num_classes) if known else ()
    save_parts(directory, models, names, SamplingConfig(), usage)
    return models


def as_exported(parts: T, dtype: str) -> T:
    """Weights as `save_models` stores them in `dtype` and `load_models` reads them."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)).astype(leaf.dtype), parts)


def load_models(directory: str | PurePath, mesh: Mesh | None = None, dtype: str = "auto") -> Models:
    """Reads an export onto the mesh, or onto the first device; weights in float32.

    Another `dtype` than "auto" is what the transformer computes in, and bfloat16 also what its
    large weights are held in: half the memory.

    Raises: BadInput if there is none, it is damaged, or holds a tokenizer only.
    """
    folder, about, abstract = abstract_models(directory, dtype)
    if "transformer" not in abstract:
        raise BadInput(
            f"{folder} holds a tokenizer but no transformer; convert it with --transformer too."
        )
    sampling = section(SamplingConfig, about, "sampling", folder)
    weights = load_weights(folder, placed(abstract, mesh, dtype))
    return Models(**weights, class_names=tuple(about["class_names"]), sampling=sampling)


def load_refiner(
    directory: str | PurePath, drafter: Models, mesh: Mesh | None = None, dtype: str = "auto"
) -> Models:
    """Reads the transformer of an export that goes on where `drafter` ends, and shares the rest.

    Raises: BadInput, ahead of reading it, if they differ in tokenizer, scales or classes.
    """
    folder, about, abstract = abstract_models(directory, dtype)
    if "transformer" not in abstract:
        raise BadInput(f"refiner: {folder} holds no transformer.")
    check_refiner(drafter, Models(**abstract, class_names=tuple(about["class_names"])), str(folder))
    ours, theirs = fingerprint(drafter.tokenizer), about.get("fingerprints", {}).get("tokenizer")
    if ours != (theirs or fingerprint(load_tokenizer(directory, mesh))):
        raise BadInput(f"refiner: the tokenizer of {folder} has other weights than the drafter's.")
    weights = load_weights(folder, {"transformer": placed(abstract, mesh, dtype)["transformer"]})
    return drafter._replace(**weights)


def check_refiner(drafter: Models, refiner: Models, name: str) -> None:
    """Raises BadInput unless two models are VARs of the same scales, codes and classes."""
    for model in (drafter, refiner):
        if (kind := model.transformer.config.kind) != "var":
            raise BadInput(f"refiner: a model of kind {kind} has no scales to draft or refine.")
    if drafter.class_names != refiner.class_names:
        raise BadInput(f"refiner: {name} has other classes than the drafter.")
    ours, theirs = vars(drafter.tokenizer.config), vars(refiner.tokenizer.config)
    if wrong := next((field for field in ours if ours[field] != theirs[field]), None):
        raise BadInput(
            f"refiner: the tokenizer of {name} has {wrong}={theirs[wrong]}, the drafter's"
            f" {ours[wrong]}; expected the same tokenizer."
        )


def placed(abstract: dict[str, Any], mesh: Mesh | None, dtype: str = "auto") -> dict[str, Any]:
    """A tokenizer and a transformer as `load_models` reads them, abstract weights on the mesh."""
    tokenizer, transformer = abstract["tokenizer"], abstract["transformer"]
    if dtype == "bfloat16":
        transformer = in_bfloat16(transformer)
    if mesh is not None:
        tokenizer, transformer = (
            shard(tokenizer, mesh),
            shard(transformer, mesh, transformer.layout),
        )
    return {"tokenizer": tokenizer, "transformer": transformer}


def mesh_for_sampling(directory: str | PurePath, fsdp: int | None = None) -> Mesh | None:
    """All devices, the weights of an export split as in its training or over `fsdp` devices.

    None for a single device, which needs no mesh. Raises: BadInput if there is no export.
    """
    folder, about, _ = abstract_models(directory)
    if jax.device_count() == 1:
        return None
    trained = about.get("trained")
    split = section(MeshConfig, trained if isinstance(trained, dict) else {}, "mesh", folder)
    mesh = sampling_mesh(split.fsdp if fsdp is None else fsdp, split.tensor)
    check_hosts(mesh)
    return mesh


def in_bfloat16(transformer: Backbone) -> Backbone:
    """The abstract transformer with its large weights in bfloat16."""
    cast = lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, jnp.bfloat16 if len(transformer.layout(path, leaf)) else leaf.dtype
    )
    return jax.tree_util.tree_map_with_path(cast, transformer)


def load_tokenizer(directory: str | PurePath, mesh: Mesh | None = None) -> Tokenizer:
    """Reads the tokenizer of an export, on every device of the mesh, weights in float32.

    Raises: BadInput if there is none, or it is damaged.
    """
    folder, _, abstract = abstract_models(directory)
    tokenizer = abstract["tokenizer"]
    tokenizer = tokenizer if mesh is None else shard(tokenizer, mesh)
    return load_weights(folder, {"tokenizer": tokenizer})["tokenizer"]


def load_parts(directory: str | PurePath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`parts` and `torch_buffers` of `save_parts` as NumPy arrays, in the dtypes they were saved.

    Raises: BadInput if there is no export, or it is damaged.
    """
    folder, about, abstract = abstract_models(directory)
    buffers = about.get("torch_buffers", {})
    kept = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in buffers.items()}
    parts = load_weights(folder, {**abstract, "torch_buffers": kept}, as_stored=True)
    return parts, parts.pop("torch_buffers")


def abstract_models(
    directory: str | PurePath, dtype: str = "auto"
) -> tuple[epath.Path, dict, dict[str, Any]]:
    """The folder, its config.json, and its models with abstract weights.

    Another `dtype` than "auto" replaces the one that the transformer computes in.

    Raises: BadInput if it is no export; Failure if it comes from the hub and could not.
    """
    if hub.is_name(directory):
        hub.fetch(directory, convert)
    folder, about = find_export(directory), export_config(directory)
    if not isinstance(about.get("tokenizer"), dict) or "class_names" not in about:
        raise BadInput(f"{folder}/config.json describes no tokenizer; expected a checkpoint.")
    names = about["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{folder}/config.json: class_names={str(names)[:40]}; expected texts.")
    about["tokenizer"].pop("skip", None)  # of older exports: what patch_size > 1 says
    models = {"tokenizer": build(section(TokenizerConfig, about, "tokenizer", folder))}
    if "transformer" in about:
        config = section(TransformerConfig, about, "transformer", folder)
        if dtype != "auto":
            config = dataclasses.replace(config, dtype=dtype)
        try:
            models["transformer"] = build(config)
        except BadInput as error:
            raise BadInput(f"{folder}/config.json: transformer.{error}") from None
        if len(names) != config.num_classes:
            found = f"{len(names)} class_names for {config.num_classes} classes"
            raise BadInput(f"{folder}/config.json has {found}.")
    return folder, about, models


def section(cls: type[T], about: dict, name: str, folder: PurePath) -> T:
    """A section of config.json in `folder`. Raises: BadInput, naming the file."""
    try:
        config = from_dict(cls, about.get(name, {}), name)
    except BadInput as error:
        raise BadInput(f"{folder}/config.json: {error}") from None
    for field, value in vars(config).items():  # ahead of building, which takes memory for each
        values = value if isinstance(value, tuple) else (value,)
        most = MOST.get(field, 2**24)
        if len(values) > MOST_VALUES or any(type(v) is int and v > most for v in values):
            found = f"{name}.{field}={str(value)[:40]}"
            raise BadInput(f"{folder}/config.json: {found} is beyond any model.")
    return config
