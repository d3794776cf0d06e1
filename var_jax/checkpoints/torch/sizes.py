"""The sizes of a model, from the names and shapes of its PyTorch state dict."""

import re

import jax.numpy as jnp
import numpy as np

from var_jax import BadInput
from var_jax.checkpoints.torch.names import CODE_USAGE, Tensors
from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512, Schedule, level_ids, num_tokens

MARKS = {"tokenizer": "encoder.conv_in.weight", "transformer": "word_embed.weight"}
TEMPERATURES = "blocks.0.attn.scale_mul_1H11"  # one for each head, with QK-norm


def check_kind(tensors: Tensors, kind: str) -> None:
    """Raises BadInput unless a file given as a "tokenizer" or "transformer" holds one."""
    if MARKS[kind] not in tensors:
        (other,) = MARKS.keys() - {kind}
        found = f"a {other}" if MARKS[other] in tensors else f"no tensor {MARKS[kind]!r}"
        raise BadInput(f"--{kind} expects the weights of a {kind}, but this file holds {found}.")


def tokenizer_config(
    tensors: Tensors, patch_nums: Schedule | None, codebook_znorm: bool = False
) -> TokenizerConfig:
    """Sizes of a tokenizer; its schedule is the official one of 256 px unless given.

    Raises: BadInput naming the tensor that says otherwise.
    """
    check_kind(tensors, "tokenizer")
    vocab_size, latent_dim = sizes(tensors, "quantize.embedding.weight", 2)
    channels = sizes(tensors, "encoder.conv_in.weight", 4)[0]
    widths = [
        sizes(tensors, f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(count(tensors, r"encoder\.down\.(\d+)\.") or 1)
    ]
    if patch_nums is None:
        scales = sizes(tensors, CODE_USAGE, 2)[0] if CODE_USAGE in tensors else 0
        scales = count(tensors, r"quantize\.quant_resi\.(\d+)\.") or scales
        if scales not in (0, len(PATCH_NUMS_256)):
            raise BadInput(f"this tokenizer has {scales} scales; give their sides as --patch_nums.")
        patch_nums = PATCH_NUMS_256
    return TokenizerConfig(
        patch_nums=patch_nums,
        vocab_size=vocab_size,
        latent_dim=latent_dim,
        channels=channels,
        channel_mults=tuple(width // channels for width in widths),
        num_res_blocks=count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        num_phi=phis(tensors, patch_nums),
        codebook_znorm=codebook_znorm,
    )


def phis(tensors: Tensors, patch_nums: Schedule) -> int:
    """How many phi convolutions the scales share; 0 if each has its own."""
    own = count(tensors, r"quantize\.quant_resi\.(\d+)\.")
    if own not in (0, len(patch_nums)):
        raise BadInput(
            f"{own} tensors 'quantize.quant_resi.*.weight', each for one scale, do not fit the"
            f" {len(patch_nums)} scales of patch_nums={patch_nums}."
        )
    return count(tensors, r"quantize\.quant_resi\.qresi(?:_ls\.(\d+))?\.")


def transformer_config(
    tensors: Tensors, patch_nums: Schedule | None, num_heads: int | None = None
) -> TransformerConfig:
    """Sizes of a transformer; what they cannot say comes from the arguments.

    Raises: BadInput naming the tensor, or the flag that has to be given.
    """
    check_kind(tensors, "transformer")
    rows, width = sizes(tensors, "class_emb.weight", 2)
    vocab_size = sizes(tensors, "head.weight", 2)[0]
    hidden = sizes(tensors, "blocks.0.ffn.fc1.weight", 2)[0]
    depth = count(tensors, r"blocks\.(\d+)\.")
    return TransformerConfig(
        patch_nums=schedule(tensors, patch_nums),
        vocab_size=vocab_size,
        latent_dim=sizes(tensors, "word_embed.weight", 2)[1],
        num_classes=rows - 1,  # the last row stands for "no class"
        depth=depth,
        width=width,
        num_heads=heads(tensors, width, num_heads),
        mlp_ratio=hidden / width,
        qk_norm=TEMPERATURES in tensors,
        shared_adaln="shared_ada_lin.1.weight" in tensors,
        drop_path=0.1 * depth / 24,
    )


def heads(tensors: Tensors, width: int, num_heads: int | None) -> int:
    """One for each temperature; without QK-norm the argument, or heads of 64 channels."""
    if TEMPERATURES not in tensors:
        if num_heads is None and width % 64:
            raise BadInput(f"width {width} is no multiple of 64; give --num_heads.")
        return num_heads or width // 64
    found = sizes(tensors, TEMPERATURES, 4)[1]
    if num_heads not in (None, found):
        raise BadInput(f"--num_heads={num_heads}, but {TEMPERATURES!r} is of {found} heads.")
    return found


def schedule(tensors: Tensors, patch_nums: Schedule | None) -> Schedule:
    """The sides of the scales: as given, as the file's `lvl_1L` says, or the official ones."""
    length, scales = sizes(tensors, "pos_1LC", 3)[1], sizes(tensors, "lvl_embed.weight", 2)[0]
    official = {num_tokens(p): p for p in (PATCH_NUMS_256, PATCH_NUMS_512)}
    found = written_schedule(tensors) or official.get(length)
    chosen = patch_nums or found
    if chosen is None:
        raise BadInput(f"{scales} scales with {length} tokens in all: give --patch_nums.")
    if num_tokens(chosen) != length or len(chosen) != scales:
        raise BadInput(
            f"patch_nums={chosen} make {num_tokens(chosen)} tokens in {len(chosen)} scales, but"
            f" 'pos_1LC' has {length} and 'lvl_embed.weight' {scales}."
        )
    if found not in (None, chosen):
        raise BadInput(f"--patch_nums={chosen}, but the file is of {found}.")
    return chosen


def written_schedule(tensors: Tensors) -> Schedule | None:
    """The schedule in the buffer `lvl_1L`, the scale of each token; None if it holds none."""
    if "lvl_1L" not in tensors or not jnp.issubdtype(tensors["lvl_1L"].dtype, jnp.integer):
        return None
    levels = np.asarray(tensors["lvl_1L"]).reshape(-1)
    _, counts = np.unique(levels, return_counts=True)
    sides = tuple(int(side) for side in np.sqrt(counts).round())
    same = num_tokens(sides) == levels.size and np.array_equal(level_ids(sides), levels)
    return sides if same else None


def sizes(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there and have so many axes, none of them empty."""
    if name not in tensors:
        raise BadInput(f"tensor {name!r} is missing.")
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise BadInput(f"tensor {name!r} has shape {shape}, expected {axes} axes, none empty.")
    return shape


def count(tensors: Tensors, pattern: str) -> int:
    """How many different things the names number."""
    found = (re.match(pattern, name) for name in tensors)
    return len({match[1] for match in found if match})
