"""Reads weights of the PyTorch release, and writes them back.

    python -m var_jax.convert --tokenizer vae_ch160v4096z32.pth --transformer var_d16.pth --out d16
    python -m var_jax.convert --checkpoint d16 --to_torch DIR

Files are `.pth` or `.safetensors`; torch is not needed. Sizes are read from the tensors. The
flags say what shapes cannot: the schedule if it is not an official one, the number of heads if
it is not width / 64 (and there is no QK-norm), codes chosen by cosine.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from var_jax import BadInput
from var_jax.checkpoints.torch.files import open_tensors, write_pth, write_safetensors
from var_jax.checkpoints.torch.names import (
    CODE_USAGE,
    Tensors,
    buffers,
    check,
    from_torch,
    leaves,
    to_torch,
)
from var_jax.checkpoints.torch.sizes import tokenizer_config, transformer_config
from var_jax.config import SamplingConfig, TokenizerConfig, TransformerConfig
from var_jax.data.sources.imagenet import class_names
from var_jax.models.load import load_parts, save_parts
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.tools import cli
from var_jax.tools.logs import progress

TOKENIZER = flags.DEFINE_string("tokenizer", None, "PyTorch file of the tokenizer.")
TRANSFORMER = flags.DEFINE_string("transformer", None, "PyTorch file of the transformer.")
PATCH_NUMS = flags.DEFINE_list("patch_nums", None, "Sides of the scales, like 1,2,3.")
NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Attention heads of the transformer.", 1)
ZNORM = flags.DEFINE_bool("codebook_znorm", False, "Nearest codes by cosine, not by distance.")
OUT = flags.DEFINE_string("out", None, "Folder of the checkpoint to write.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Checkpoint to convert to PyTorch.")
TO_TORCH = flags.DEFINE_string("to_torch", None, "Folder of the PyTorch files to write.")
FORMAT = flags.DEFINE_enum("format", "pth", ["pth", "safetensors"], "Of the files written.")

FROM = (TOKENIZER, TRANSFORMER, PATCH_NUMS, NUM_HEADS, ZNORM, OUT)
BACK = (CHECKPOINT, TO_TORCH, FORMAT)
# Where a training checkpoint of the release keeps its two state dicts.
INSIDE = {"tokenizer": ("trainer", "vae_local"), "transformer": ("trainer", "var_wo_ddp")}


def main(argv: list[str]) -> None:
    """Converts one way or the other."""
    cli.no_arguments(argv)
    given = {flag.name for flag in (*FROM, *BACK) if flag.present}
    only = lambda allowed: given <= {flag.name for flag in allowed}
    if TOKENIZER.value and OUT.value and only(FROM):
        paths = {"tokenizer": TOKENIZER.value, "transformer": TRANSFORMER.value}
        convert({name: path for name, path in paths.items() if path}, OUT.value)
    elif CHECKPOINT.value and TO_TORCH.value and only(BACK):
        convert_back(CHECKPOINT.value, TO_TORCH.value)
    else:
        found = ", ".join(f"--{name}" for name in sorted(given)) or "neither"
        raise BadInput(
            "give --tokenizer and --out to convert from PyTorch, or --checkpoint and --to_torch to"
            f" convert back; found {found}."
        )


def convert(paths: dict[str, str], out: str) -> None:
    """PyTorch files → checkpoint. Names, shapes and values are checked before it is written."""
    files = {name: open_tensors(path, *INSIDE[name]) for name, path in paths.items()}
    models = abstract_models(paths, files)
    total = sum(len(names) for model in models.values() for _, _, names, _ in leaves(model))
    with progress(total, 0, "reading tensors") as bar:
        for name, model in models.items():
            with about_file(paths[name]):
                models[name] = from_torch(model, files[name], bar.update)
    usage = {name: np.asarray(t) for name, t in files["tokenizer"].items() if name == CODE_USAGE}
    known = "transformer" in models
    names = class_names(models["transformer"].config.num_classes) if known else ()
    save_parts(out, models, names, SamplingConfig(), usage)
    print(f"{out} holds {' and '.join(map(describe, models.values()))}")


def abstract_models(paths: dict[str, str], files: Mapping[str, Tensors]) -> dict[str, Any]:
    """The models that the files describe, without weights."""
    sides, transformer, models = patch_nums(), None, {}
    if "transformer" in files:
        with about_file(paths["transformer"]):
            transformer = transformer_config(files["transformer"], sides, NUM_HEADS.value)
            sides = transformer.patch_nums
    with about_file(paths["tokenizer"]):
        tokenizer = tokenizer_config(files["tokenizer"], sides, ZNORM.value)
    models["tokenizer"] = jax.eval_shape(lambda: Tokenizer(tokenizer, rngs=nnx.Rngs(0)))
    if transformer:
        check_pair(tokenizer, transformer)
        models["transformer"] = jax.eval_shape(lambda: Transformer(transformer, rngs=nnx.Rngs(0)))
    for name, model in models.items():
        with about_file(paths[name]):
            check(model, files[name])
    return models


def patch_nums() -> tuple[int, ...] | None:
    """The flag as integers."""
    if PATCH_NUMS.value is None:
        return None
    if not all(side.strip().isdecimal() for side in PATCH_NUMS.value):
        given = ",".join(PATCH_NUMS.value)
        raise BadInput(f"--patch_nums={given} must be whole numbers with commas, like 1,2,3.")
    return tuple(map(int, PATCH_NUMS.value))


@contextlib.contextmanager
def about_file(path: str) -> Iterator[None]:
    """Names the file in what goes wrong with it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error) if path in str(error) else f"{path}: {error}") from error


def check_pair(tokenizer: TokenizerConfig, transformer: TransformerConfig) -> None:
    """Raises BadInput unless the transformer speaks the tokenizer's codes."""
    for field, what in (("vocab_size", "codes"), ("latent_dim", "channels a code")):
        ours, theirs = getattr(tokenizer, field), getattr(transformer, field)
        if ours != theirs:
            raise BadInput(
                f"{TOKENIZER.value} has {ours} {what}, but {TRANSFORMER.value} was made for"
                f" {theirs}; expected a tokenizer and a transformer of the same model."
            )


def describe(model: Any) -> str:
    """A model in one line."""
    leaves = jax.tree.leaves(model)
    count = sum(leaf.size for leaf in leaves) / 1e6
    kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    c = model.config
    if isinstance(c, TokenizerConfig):
        side = c.patch_nums[-1] * c.downsample
        return f"a tokenizer of {count:.1f} M {kinds} ({side} px, {c.vocab_size} codes)"
    return f"a transformer of {count:.1f} M {kinds} (depth {c.depth}, {c.num_classes} classes)"


def convert_back(checkpoint: str, out: str) -> None:
    """Checkpoint → PyTorch files that the release loads strictly."""
    parts, usage = load_parts(checkpoint)
    states: dict[str, dict[str, np.ndarray]] = {}
    for name, model in parts.items():
        if reason := no_counterpart(model.config):
            sentence = f"the {name} of {checkpoint} cannot be written: {reason}."
            if len(parts) == 1:
                raise BadInput(sentence)
            print(sentence, file=sys.stderr)
        else:
            states[name] = to_torch(model) | buffers(model)
            states[name].update({n: a for n, a in usage.items() if n in states[name]})
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--to_torch={out} is a file; expected a folder to write to.")
    folder.mkdir(parents=True, exist_ok=True)
    write = write_pth if FORMAT.value == "pth" else write_safetensors
    made = {name: folder / f"{name}.{FORMAT.value}" for name in states}
    beside = {name: folder / f".{path.name}.partial" for name, path in made.items()}
    try:
        with progress(sum(map(len, states.values())), 0, "writing tensors") as bar:
            for name, state in states.items():
                write(beside[name], state, bar.update)
        for name, path in made.items():
            beside[name].replace(path)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
    for name, path in made.items():
        print(
            f"{path} holds {describe(parts[name])}; in PyTorch: {constructor(parts[name].config)}"
        )


def no_counterpart(config: TokenizerConfig | TransformerConfig) -> str:
    """Which field of a config the PyTorch release cannot express; "" if none."""
    if isinstance(config, TokenizerConfig):
        for field, only in (
            ("patch_size", 1), ("skip", False), ("norm_groups", 32), ("num_res_blocks", 2),
            ("channel_mults", (1, 1, 2, 2, 4)),
        ):  # fmt: skip
            if (value := getattr(config, field)) != only:
                return f"tokenizer.{field}={value} has no counterpart in the PyTorch release"
    return ""


def constructor(c: TokenizerConfig | TransformerConfig) -> str:
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


if __name__ == "__main__":
    cli.run(main)
