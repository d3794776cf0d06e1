"""Names and layouts of the public PyTorch checkpoints, for reading and writing them.

`from_torch` and `to_torch` translate a whole state dict of NumPy arrays. Stacked weights
(transformer blocks, phi convolutions) are one tensor a layer on the other side.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from var_jax import BadInput
from var_jax.config import TokenizerConfig
from var_jax.schedule import level_ids
from var_jax.tools.trees import path_name

T = TypeVar("T", bound=nnx.Module)
Tensors = Mapping[str, Any]  # arrays, or anything with shape and dtype that NumPy can read

# Ours → theirs, applied in order to paths such as "encoder.levels.0.blocks.1.norm1.scale".
TOKENIZER_RULES = (
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"^encoder\.halve\.(\d+)", r"encoder.down.\1.downsample.conv"),
    (r"^decoder\.double\.(\d+)", lambda m: f"decoder.up.{int(m[1]) + 1}.upsample.conv"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.block", ".mid.block_"),
    (r"\.middle\.attention", ".mid.attn_1"),
    (r"\.proj\.", ".proj_out."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^pre_conv", "quant_conv"),
    (r"^post_conv", "post_quant_conv"),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"\.(kernel|scale)$", ".weight"),
)
# Linear layers, theirs (out, in): NAME and NAME_bias are .weight and .bias of
LINEAR = {
    "word": "word_embed",
    "ada": "shared_ada_lin.1",
    "blocks.ada": "ada_lin.1",
    "blocks.qkv": "attn.mat_qkv",
    "blocks.proj": "attn.proj",
    "blocks.fc1": "ffn.fc1",
    "blocks.fc2": "ffn.fc2",
    "head_ada": "head_nm.ada_lin.1",
    "head": "head",
}
TRANSFORMER_NAMES = {
    "class_embed": "class_emb.weight",
    "start": "pos_start",
    "pos_embed": "pos_1LC",
    "level_embed": "lvl_embed.weight",
    "blocks.ada_offset": "ada_gss",
    "blocks.log_scale": "attn.scale_mul_1H11",
    "blocks.q_bias": "attn.q_bias",
    "blocks.v_bias": "attn.v_bias",
    **{name: f"{layer}.weight" for name, layer in LINEAR.items()},
    **{f"{name}_bias": f"{layer}.bias" for name, layer in LINEAR.items()},
}
CODE_USAGE = "quantize.ema_vocab_hit_SV"


def torch_names(path: str, shape: tuple[int, ...], num_phi: int) -> list[str]:
    """Their name of one of our leaves; several where ours stacks layers along the first axis."""
    if path.startswith("quantizer.phi_"):
        leaf = "weight" if path.endswith("kernel") else "bias"
        # The container is named after how the scales share the convolutions (0: not).
        form = {0: "{}", 1: "qresi"}.get(num_phi, "qresi_ls.{}")
        return [f"quantize.quant_resi.{form.format(phi)}.{leaf}" for phi in range(shape[0])]
    if path.startswith("blocks."):
        return [f"blocks.{i}.{TRANSFORMER_NAMES[path]}" for i in range(shape[0])]
    if path in TRANSFORMER_NAMES:
        return [TRANSFORMER_NAMES[path]]
    for pattern, replacement in TOKENIZER_RULES:
        path = re.sub(pattern, replacement, path)
    return [path]


def leaves(model: nnx.Module) -> Iterator[tuple[str, bool, list[str], tuple[int, ...]]]:
    """(our path, stacked?, their names, our shape of one of them) of every leaf."""
    num_phi = getattr(model.config, "num_phi", 0)  # type: ignore[attr-defined]
    for key, leaf in jax.tree_util.tree_leaves_with_path(model):
        path = path_name(key)
        stacked = path.startswith(("blocks.", "quantizer.phi_"))
        yield path, stacked, torch_names(path, leaf.shape, num_phi), leaf.shape[stacked:]


def from_torch(model: T, tensors: Tensors, done: Callable[[], object] = lambda: None) -> T:
    """`model` (its leaves may be abstract) with the weights of a state dict, in their dtypes.

    The tensors may lie in a file: they are read one by one, after `check`; `done` is called after
    each.

    Raises: BadInput naming a tensor that is missing, surplus, of the wrong shape or not finite.
    """
    check(model, tensors)
    values = []
    for path, stacked, names, shape in leaves(model):
        dtype = functools.reduce(jnp.promote_types, (tensors[name].dtype for name in names))
        ours = np.empty((len(names), *shape), dtype)
        for i, name in enumerate(names):
            array = np.asarray(tensors[name])
            if not np.isfinite(array).all():
                raise BadInput(f"tensor {name!r} holds values that are not finite.")
            ours[i] = from_theirs(path, array, shape)
            done()
        values.append(ours if stacked else ours[0])
    return jax.tree.unflatten(jax.tree.structure(model), values)


def to_torch(model: nnx.Module) -> dict[str, Float[np.ndarray, "..."]]:
    """A state dict of the weights, the inverse of `from_torch`; their `buffers` are left out."""
    tensors = {}
    for (path, stacked, names, _), leaf in zip(leaves(model), jax.tree.leaves(model), strict=True):
        layers = np.asarray(leaf) if stacked else np.asarray(leaf)[None]
        tensors.update({n: theirs(path, a) for n, a in zip(names, layers, strict=True)})
    return tensors


def buffers(model: nnx.Module) -> dict[str, np.ndarray]:
    """What their modules save beside the weights; all follows from the config.

    But `quantize.ema_vocab_hit_SV`, how often training used each code: zero here.
    """
    c = model.config  # type: ignore[attr-defined]
    dtype = jax.tree.leaves(model)[0].dtype
    if isinstance(c, TokenizerConfig):
        return {CODE_USAGE: np.zeros((len(c.patch_nums), c.vocab_size), dtype)}
    level = level_ids(c.patch_nums)
    mask = np.where(level[:, None] >= level, 0, -np.inf).astype(dtype)
    return {
        "lvl_1L": level[None].astype(np.int64),
        "attn_bias_for_masking": mask[None, None],
        **{f"blocks.{i}.attn.zero_k_bias": np.zeros(c.width, dtype) for i in range(c.depth)},
    }


def check(model: nnx.Module, tensors: Tensors) -> None:
    """Raises BadInput naming the first tensor that does not belong to a model of these sizes."""
    expected = {
        name: theirs(path, np.broadcast_to(np.float32(0), shape)).shape
        for path, _, names, shape in leaves(model)
        for name in names
    }
    derived = {name: array.shape for name, array in buffers(model).items()}
    for name in expected:
        if name not in tensors:
            raise BadInput(f"tensor {name!r} is missing.")
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise BadInput(f"tensor {name!r} holds {tensors[name].dtype}, expected floats.")
    for name, tensor in tensors.items():
        if name not in expected and name not in derived:
            raise BadInput(f"tensor {name!r} is surplus: a model of these sizes has none.")
        shape = expected.get(name) or derived[name]
        # A tokenizer may have been trained with another schedule than it is used with.
        if tensor.shape != shape and name != CODE_USAGE:
            raise BadInput(f"tensor {name!r} has shape {tensor.shape}, expected {shape}.")
        if name.endswith("zero_k_bias") and np.any(np.asarray(tensor)):
            raise BadInput(f"tensor {name!r} is not zero; keys have no bias in this model.")


def from_theirs(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One of their tensors in our layout."""
    if path.endswith("kernel"):  # of a convolution: theirs OIHW, ours HWIO
        return array.transpose(2, 3, 1, 0)
    return (array.T if path in LINEAR else array).reshape(shape)


def theirs(path: str, array: np.ndarray) -> np.ndarray:
    """One of our tensors in their layout."""
    if path.endswith("kernel"):
        return array.transpose(3, 2, 0, 1)
    if path in LINEAR:
        inputs = 2 if path == "blocks.proj" else 1  # proj reads (heads, head_dim)
        return array.reshape(int(np.prod(array.shape[:inputs])), -1).T
    if path.endswith("bias"):
        return array.reshape(-1)
    if path == "blocks.log_scale":
        return array.reshape(1, -1, 1, 1)
    lead = {"start": (1,), "pos_embed": (1,), "blocks.ada_offset": (1, 1)}.get(path, ())
    return array.reshape(*lead, *array.shape)
