"""Flags of sampling, which several commands have, and what they say."""

import ast
import itertools
from typing import Any

from absl import flags

from var_jax import BadInput
from var_jax.config import parse_guidance
from var_jax.schedule import Schedule
from var_jax.tools import cli

SWEPT = ("cfg", "top_k", "top_p", "temperature", "steps")  # of which a sweep has lists


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


def define_sweep() -> None:
    """Defines the flags of `sweep`, which default to what the checkpoint says."""
    say = lambda text: f"{text} Default: the checkpoint's."
    flags.DEFINE_list("cfg", None, say("Guidance scales."))
    flags.DEFINE_list("top_k", None, say("Codes to sample from, 0: all."))
    flags.DEFINE_list("top_p", None, say("Shares of probability, 0: all."))
    flags.DEFINE_list("temperature", None, say("Sampling temperatures to sweep."))
    flags.DEFINE_string("guidance", None, say("As of `sample`."))
    flags.DEFINE_list("steps", None, say("Of a diffusion transformer."))
    flags.DEFINE_enum("solver", None, ["euler", "heun"], say("Of a diffusion transformer."))


def sweep(args: flags.FlagValues) -> dict[str, dict[str, Any]]:
    """Every combination of the flags of `define_sweep`, by name, as `Model.settings` takes them.

    One combination alone is called "". Raises: BadInput.
    """
    given = {name: cli.numbers(f"--{name}", args[name].value) for name in SWEPT}
    lists = {name: values for name, values in given.items() if values is not None}
    for name, least in (("top_k", 0), ("steps", 1)):
        if wrong := [value for value in lists.get(name, ()) if not value.is_integer()]:
            raise BadInput(f"--{name}={wrong[0]:g}; expected a whole number of at least {least}.")
    found = {}
    for values in itertools.product(*lists.values()):
        point: dict[str, Any] = dict(zip(lists, values, strict=True))
        name = "-".join(f"{key}{value:g}" for key, value in point.items())
        point |= {key: int(point[key]) for key in ("top_k", "steps") if key in point}
        guidance = args.guidance
        if guidance and len(lists.get("cfg", ())) > 1 and not point["cfg"]:  # a point without
            guidance = guidance if parse_guidance(guidance)[0] == "ssg" else "ramp"
        found[name] = point | {"guidance": guidance, "solver": args.solver}
    return found if len(found) > 1 else {"": next(iter(found.values()))}


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
        pairs = [(size, size) if type(size) is int else size for size in sizes]
        if all(len(pair) == 2 and {*map(type, pair)} == {int} for pair in pairs):
            return sizes
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise BadInput(f"--patch_nums={text[:60]}; expected whole numbers or pairs, like 1,2,(2,3).")


def define_solver() -> None:
    """Defines --steps and --solver of diffusion transformers."""
    text = " of a diffusion transformer. Default: the checkpoint's."
    flags.DEFINE_integer("steps", None, f"From noise to image,{text}", 1)
    flags.DEFINE_enum("solver", None, ["euler", "heun"], f"First or second order,{text}")
