"""Whole models to and from the files of the PyTorch release.

This module knows no networks: whoever calls it gives `build`, which makes the abstract model of a
config.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from var_jax import BadInput
from var_jax.checkpoints.torch.legacy import MAGIC, LegacyFile
from var_jax.checkpoints.torch.names import (
    CODE_USAGE,
    Tensors,
    buffers,
    from_torch,
    leaves,
    to_torch,
)
from var_jax.checkpoints.torch.pth import Archive, check_tensors, write_pth
from var_jax.checkpoints.torch.safetensors import read_safetensors, write_safetensors
from var_jax.checkpoints.torch.sizes import MARKS, tokenizer_config, transformer_config
from var_jax.checkpoints.torch.state_dict import file_and_key, find_state_dict
from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.schedule import Schedule, px
from var_jax.tools.files import local_path, replacing
from var_jax.tools.logs import progress

ModelConfig = TokenizerConfig | TransformerConfig
Build = Callable[[ModelConfig], Any]
WRITERS = {"pth": write_pth, "safetensors": write_safetensors}
# What the release has no option for.
FIXED = {
    "kind": "var", "adaln": True, "patch_size": 1, "window": 0, "norm_groups": 32,
    "num_res_blocks": 2, "channel_mults": (1, 1, 2, 2, 4),
}  # fmt: skip


def open_tensors(path: str | Path, mark: str = "") -> Tensors:
    """The tensors of a state dict by name, in a file of either format; values stay on disk.

    Of several in the file it is the one with a tensor `mark`, or that of FILE:KEY.

    Raises: BadInput if there is no such file, it holds something else, or it is damaged.
    """
    path, key = file_and_key(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04"):
            return check_tensors(path, find_state_dict(path, Archive(path).unpickle(), key, mark))
        if head.startswith(MAGIC):
            content = LegacyFile(path).unpickle()
            return check_tensors(path, find_state_dict(path, content, key, mark))
        if head[8:9] == b"{":
            return find_state_dict(path, read_safetensors(path), key, mark)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    raise BadInput(f"{path} {kind_of(head)}; expected weights as .pth or .safetensors.")


def kind_of(head: bytes) -> str:
    """What a file that holds no weights seems to be, as the verb of a sentence."""
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, such as the error page of a failed download"
    return "is no file of weights, or the start of it is missing"


def read_models(
    paths: Mapping[str, str],
    build: Build,
    patch_nums: Schedule | None = None,
    num_heads: int | None = None,
    codebook_znorm: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The models in the files of a "tokenizer" and maybe a "transformer", and the code usage.

    Sizes are read from the tensors; the other arguments say what shapes cannot. Names, shapes and
    values are checked.

    Raises: BadInput, naming file and tensor.
    """
    files = {name: open_tensors(path, MARKS[name]) for name, path in paths.items()}
    configs: dict[str, ModelConfig] = {}
    if "transformer" in files:
        with naming(paths["transformer"]):
            config = transformer_config(files["transformer"], patch_nums, num_heads)
        configs["transformer"], patch_nums = config, config.patch_nums
    with naming(paths["tokenizer"]):
        configs["tokenizer"] = tokenizer_config(files["tokenizer"], patch_nums, codebook_znorm)
    check_pair(paths, configs)
    models = {name: build(configs[name]) for name in paths}
    total = sum(len(names) for model in models.values() for _, _, names, _ in leaves(model))
    with progress(total, 0, "reading tensors") as bar:
        for name, model in models.items():
            with naming(paths[name]):
                models[name] = from_torch(model, files[name], bar.update)
    usage = {name: np.asarray(t) for name, t in files["tokenizer"].items() if name == CODE_USAGE}
    return models, usage


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Names the file in what goes wrong with it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error) if path in str(error) else f"{path}: {error}") from error


def check_pair(paths: Mapping[str, str], configs: Mapping[str, ModelConfig]) -> None:
    """Raises BadInput unless the transformer is of the tokenizer's codes."""
    for field, what in (("vocab_size", "codes"), ("latent_dim", "channels a code")):
        found = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(found.values())) > 1:
            raise BadInput(
                f"{paths['tokenizer']} has {found['tokenizer']} {what}, but"
                f" {paths['transformer']} was made for {found['transformer']}; expected a"
                " tokenizer and a transformer of the same model."
            )


def write_models(
    models: Mapping[str, Any],
    usage: Mapping[str, np.ndarray],
    folder: str | PurePath,
    format: str = "pth",
) -> tuple[dict[str, Path], dict[str, str]]:
    """Writes files that the release loads strictly: all of them, or none.

    Returns the path of each model's file, and of each model that the release cannot express the
    reason. `format` is "pth" or "safetensors".

    Raises: BadInput if no model can be written.
    """
    folder, states, left_out = local_path(folder), {}, {}
    for name, model in models.items():
        if reason := no_counterpart(model.config):
            left_out[name] = f"the {name} cannot be written: {reason}."
        else:
            states[name] = to_torch(model) | buffers(model)
            fits = lambda n, a, state=states[name]: n in state and a.shape == state[n].shape
            states[name].update({n: a for n, a in usage.items() if fits(n, a)})
    if not states:
        raise BadInput(" ".join(left_out.values()))
    paths = {name: folder / f"{name}.{format}" for name in states}
    total = sum(map(len, states.values()))
    with contextlib.ExitStack() as stack, progress(total, 0, "writing tensors") as bar:
        for name, state in states.items():
            beside = stack.enter_context(replacing(paths[name]))
            WRITERS[format](beside, state, bar.update)
    return paths, left_out


def no_counterpart(config: ModelConfig) -> str:
    """Which field of a config the PyTorch release cannot express; "" if none."""
    if any(isinstance(size, tuple) for size in config.patch_nums):
        return f"patch_nums={config.patch_nums} is not square, as the PyTorch release needs it"
    for field, only in FIXED.items():
        if (value := getattr(config, field, only)) != only:
            part = "tokenizer" if isinstance(config, TokenizerConfig) else "transformer"
            return f"{part}.{field}={value} has no counterpart in the PyTorch release"
    return ""


def summary(model: Any) -> str:
    """A model in one line."""
    leaves = jax.tree.leaves(model)
    count = sum(leaf.size for leaf in leaves) / 1e6
    kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    c = model.config
    if isinstance(c, TokenizerConfig):
        size = px(c.image_size)
        return f"a tokenizer of {count:.1f} M {kinds} ({size}, {c.vocab_size} codes)"
    return f"a transformer of {count:.1f} M {kinds} (depth {c.depth}, {c.num_classes} classes)"


def constructor(c: ModelConfig) -> str:
    """How the PyTorch release builds the module that such a file is for."""
    if isinstance(c, TokenizerConfig):
        return (
            f"VQVAE(vocab_size={c.vocab_size}, z_channels={c.latent_dim}, ch={c.channels},"
            f" using_znorm={c.codebook_znorm}, quant_resi={c.phi_ratio},"
            f" share_quant_resi={c.num_phi}, v_patch_nums={c.patch_nums})"
        )
    return (
        f"VAR(vae, num_classes={c.num_classes}, depth={c.depth}, embed_dim={c.width},"
        f" num_heads={c.num_heads}, mlp_ratio={c.mlp_ratio}, shared_aln={c.shared_adaln},"
        f" attn_l2_norm={c.qk_norm}, patch_nums={c.patch_nums})"
    )
