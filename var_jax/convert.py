"""Reads weights of the PyTorch release, and writes them back.

    python -m var_jax.convert --tokenizer vae_ch160v4096z32.pth --transformer var_d16.pth --out d16
    python -m var_jax.convert --checkpoint d16 --to_torch DIR

Files are `.pth` or `.safetensors`; torch is not needed. Sizes are read from the tensors. The
flags say what shapes cannot: the schedule if it is not an official one, the number of heads if
it is not width / 64 (and there is no QK-norm), codes chosen by cosine.
"""

import sys

from absl import flags

from var_jax import BadInput
from var_jax.checkpoints.export import check_replaceable
from var_jax.checkpoints.storage import resolve
from var_jax.checkpoints.torch.convert import constructor, summary, write_models
from var_jax.sampling.exports import convert, load_parts
from var_jax.tools import cli, sampling_flags
from var_jax.tools.files import local_path, output_folder

FROM_TORCH = ("tokenizer", "transformer", "patch_nums", "num_heads", "codebook_znorm", "out")
TO_TORCH = ("checkpoint", "to_torch", "format")


def define_flags() -> None:
    """The flags of both directions."""
    flags.DEFINE_string(
        "tokenizer", None, "PyTorch file of the tokenizer; FILE:KEY says which of its state dicts."
    )
    flags.DEFINE_string("transformer", None, "PyTorch file of the transformer, alike.")
    flags.DEFINE_string("patch_nums", None, "Sides of the scales, like 1,2,3.")
    flags.DEFINE_integer("num_heads", None, "Attention heads of the transformer.", 1)
    flags.DEFINE_bool("codebook_znorm", False, "Nearest codes by cosine, not by distance.")
    flags.DEFINE_string("out", None, "Folder of the checkpoint to write.")
    flags.DEFINE_string("checkpoint", None, 'Folder, "emoji" or "hub:d16", to convert to PyTorch.')
    flags.DEFINE_string("to_torch", None, "Folder of the PyTorch files to write.")
    flags.DEFINE_enum("format", "pth", ["pth", "safetensors"], "Format of the files written.")


def main(args: flags.FlagValues) -> None:
    """Converts one way or the other."""
    given = {name for name in (*FROM_TORCH, *TO_TORCH) if args[name].present}
    if args.tokenizer and args.out and given <= {*FROM_TORCH}:
        from_torch(args)
    elif args.checkpoint and args.to_torch and given <= {*TO_TORCH}:
        to_torch(args)
    else:
        found = ", ".join(f"--{name}" for name in sorted(given)) or "neither"
        raise BadInput(
            "give --tokenizer and --out to convert from PyTorch, or --checkpoint and --to_torch to"
            f" convert back; found {found}."
        )


def from_torch(args: flags.FlagValues) -> None:
    """PyTorch files → checkpoint."""
    paths = {"tokenizer": args.tokenizer, "transformer": args.transformer}
    paths = {name: path for name, path in paths.items() if path}
    schedule = None if args.patch_nums is None else sampling_flags.schedule(args.patch_nums)
    out = output_folder(args.out)
    check_replaceable(resolve(out))  # ahead of reading, which takes minutes
    options = {"num_heads": args.num_heads, "codebook_znorm": args.codebook_znorm}
    models = convert(paths, out, patch_nums=schedule, **options)
    print(f"{args.out} holds {' and '.join(map(summary, models.values()))}")


def to_torch(args: flags.FlagValues) -> None:
    """Checkpoint → PyTorch files that the release loads strictly."""
    local_path(args.to_torch, "--to_torch")
    out = output_folder(args.to_torch, "--to_torch")
    models, usage = load_parts(args.checkpoint)
    paths, left_out = write_models(models, usage, out, args.format)
    for sentence in left_out.values():
        print(sentence, file=sys.stderr)
    for name, path in paths.items():
        call = constructor(models[name].config)
        print(f"{path} holds {summary(models[name])}; in PyTorch: {call}")


if __name__ == "__main__":
    cli.run(main, define_flags)
