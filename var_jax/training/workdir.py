"""The work directory of a run: of one process at a time, and of one experiment for good."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices

from var_jax import BadInput
from var_jax.checkpoints import storage
from var_jax.config import Config, bound_value, from_dict, settings
from var_jax.data.inventory import remember
from var_jax.data.records import read_json
from var_jax.data.sources import Source
from var_jax.sharding import hosts
from var_jax.tools import ending
from var_jax.tools.files import acquire_lock, replacing

TRAININGS = ("tokenizer", "transformer")
RECORDED = ("fingerprint", "copies", "networks", "changes")  # in config.json, beside the fields
INPUTS = {  # what a run reads besides its data, and what an error says when it has changed
    "fingerprint": "pretrained_tokenizer held other weights than",
    "copies": "data.tokens held another number of copies than",
    "networks": "train_tokenizer.lpips_file or .gan.dino_file held other weights than",
}


def occupy(
    workdir: epath.Path, config: Config, inputs: dict[str, Any], splits: dict[str, Source]
) -> None:
    """Makes `workdir` this process's, and goes on with the run that it holds, if it holds one.

    `inputs` tells tokenizer, token cache and networks of losses from others, by name in INPUTS.

    Raises: BadInput if it is another run's, or another process is at work in it.
    """
    hosts.check_shared("--workdir", workdir)
    hosts.check_same("what the files of weights and tokens hold", inputs)
    if jax.process_index() == 0:
        if not acquire_lock(workdir / ".lock"):
            raise BadInput(
                f"another run is at work in {workdir}; name another --workdir (or, if its machine"
                " is gone, remove .lock there)."
            )
        steps_done = {name: count_steps(workdir / name) for name in TRAININGS}
        if any(steps_done.values()) and not (workdir / "config.json").exists():
            raise BadInput(
                f"{workdir} holds checkpoints but no config.json, which says of what run they are;"
                " put it back, or name another --workdir."
            )
        about = record(workdir / "config.json", config, inputs, steps_done)
        remember(workdir / "data.json", splits, begun=any(steps_done.values()))
        if about:
            with replacing(workdir / "config.json") as beside:
                beside.write_text(json.dumps(about, indent=2) + "\n")
    sync_global_devices("work directory is ours")
    number = f"-{jax.process_index()}" if jax.process_index() else ""
    ending.process.log = workdir / f"error{number}.log"


def count_steps(folder: epath.Path) -> int:
    """The step of the newest checkpoint of a training; 0 if there is none."""
    paths = folder.iterdir() if folder.exists() else ()
    return max((int(path.name) for path in paths if storage.is_checkpoint(path)), default=0)


def record(
    path: epath.Path, config: Config, inputs: dict[str, Any], steps_done: Mapping[str, int]
) -> dict[str, Any] | None:
    """What `path` shall hold of a run that has done `steps_done`; None if it holds that.

    Raises: BadInput if a field differs that numbers made so far depend on.
    """
    now = json.loads(json.dumps(settings(config)))
    if not path.exists():
        return now | inputs
    then = read_json(path)
    recorded = {name: then.pop(name) for name in RECORDED if name in then}
    try:  # A field that is newer than the run has its default.
        then = json.loads(json.dumps(settings(from_dict(Config, then))))
    except BadInput as error:
        raise BadInput(
            f"{path} is of another version of var_jax, with which the run can be finished: {error}"
        ) from None
    old, new = flat(then), flat(now)
    changed = [name for name in new if old[name] != new[name]]
    refused = [
        f"config.{name} is {old[name]}, not {new[name]}"
        for name in changed
        if binds(name, old[name], new[name], steps_done)
    ]
    for name, what in INPUTS.items():
        if any(steps_done.values()) and recorded.get(name, inputs[name]) != inputs[name]:
            refused.append(f"config.{what} {new.get(what.split()[0], 'now')}")
    if refused:
        raise BadInput(
            f"{path.parent} belongs to a run whose {'; '.join(refused)}: set back what differs, or"
            " name another --workdir."
        )
    past = recorded.get("changes", [])
    for name in changed:
        sys.stderr.write(f"{path.parent}: config.{name} is {new[name]} now, was {old[name]}\n")
        for stage in TRAININGS:
            if name == f"train_{stage}.steps" and steps_done[stage]:
                sys.stderr.write(
                    f"the {stage} goes on to step {new[name]}; its schedules are now of that many\n"
                )
    if changed:
        past = [*past, {"after": dict(steps_done), **{n: [old[n], new[n]] for n in changed}}]
    about = now | inputs | ({"changes": past} if past else {})
    return about if about != then | recorded else None


def binds(name: str, old: Any, new: Any, steps_done: Mapping[str, int]) -> bool:
    """Whether steps made so far forbid to change a field a.b of the config from `old` to `new`."""
    stage = name.split(".")[0].removeprefix("train_")
    if name == f"train_{stage}.steps":
        later = stage == "tokenizer" and steps_done["transformer"]  # it is part of those numbers
        return new < steps_done[stage] or bool(later)
    if stage != "transformer":
        stage = "tokenizer"
    begun = steps_done["transformer"] or (stage == "tokenizer" and steps_done["tokenizer"])
    return bool(begun) and bound_value(name, old) != bound_value(name, new)


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys a.b."""
    found = {}
    for name, value in fields.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found
