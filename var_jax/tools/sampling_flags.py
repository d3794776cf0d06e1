"""Flags of sampling, which several commands have, and what they say."""

import ast
from typing import Any

from absl import flags

from var_jax import BadInput
from var_jax.schedule import Schedule, shape_of
from var_jax.tools import cli


def define_sampling() -> None:
    """Defines the flags of `sampling_settings`, which default to what the checkpoint says."""
    say = lambda text: f"{text} Default: the checkpoint's."
    flags.DEFINE_float("cfg", None, say("Guidance scale; 0: none."), lower_bound=0)
    each = "One number, or one a scale: "
    text = f"Sample from the k likeliest codes; 0: all. {each}900,600,600."
    flags.DEFINE_list("top_k", None, say(text))
    text = f"Sample from this share of probability; 0: all. {each}1,0.5,0.5."
    flags.DEFINE_list("top_p", None, say(text))
    text = f"Divides the logits that top-k and top-p leave. {each}1,1.1,1.1."
    flags.DEFINE_list("temperature", None, say(text))
    flags.DEFINE_string(
        "guidance",
        None,
        say(
            "Where --cfg applies: ramp (from none at the first scale to all at the last), constant,"
            " interval=LO-HI (on these scales; the first is 1), or ssg=BETA: ramp and Scaled"
            " Spatial Guidance."
        ),
    )


def sampling_settings(args: flags.FlagValues) -> dict[str, Any]:
    """The flags of `define_sampling`, as `Model.settings` takes them. Raises: BadInput."""
    given = {n: cli.numbers(f"--{n}", args[n].value) for n in ("top_k", "top_p", "temperature")}
    if wrong := [k for k in given["top_k"] or () if k < 0 or not k.is_integer()]:
        raise BadInput(f"--top_k={wrong[0]:g}; expected a whole number of at least 0.")
    top_k = given["top_k"] and tuple(map(int, given["top_k"]))
    return {"cfg": args.cfg, "guidance": args.guidance} | given | {"top_k": top_k}


def define_schedule() -> None:
    """Defines --patch_nums of samples."""
    flags.DEFINE_string(
        "patch_nums",
        None,
        "Other scales than the model was trained at, like 1,2,4,(4,6): their sides in tokens, or"
        " (height,width). Default: the checkpoint's.",
    )


def schedule(text: str) -> Schedule:
    """The flag --patch_nums. Raises: BadInput if it does not read as sizes."""
    try:
        sizes = ast.literal_eval(f"({text},)")
        if all(type(side) is int for size in sizes for side in shape_of(size)):
            return sizes
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise BadInput(f"--patch_nums={text[:60]}; expected whole numbers or pairs, like 1,2,(2,3).")


def define_solver() -> None:
    """Defines --steps and --solver of diffusion transformers."""
    text = " of a diffusion transformer. Default: the checkpoint's."
    flags.DEFINE_integer("steps", None, f"From noise to image,{text}", 1)
    flags.DEFINE_enum("solver", None, ["euler", "heun"], f"First or second order,{text}")
