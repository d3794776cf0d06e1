"""Figures of a study that may stop and continue: each is computed once."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from var_jax import BadInput
from var_jax.config import Config, settings
from var_jax.tools.files import read_json, replacing


def kept(
    path: epath.Path, about: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The figures in the file `path`, computed and written where it is missing.

    Raises: BadInput if the file is of other settings than `about`.
    """
    about = as_json(about)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = compute()
        with replacing(path) as beside:
            beside.write_text(json.dumps({"figures": figures, "settings": about}, indent=2))
    found, defaults = read_json(path), as_json(settings(Config()))
    for name, value in about.items():
        there = completed(found["settings"].get(name), defaults.get(name))
        if there != completed(value, defaults.get(name)):
            raise BadInput(f"{path} is of {name}={there}, not {value}; name another --out.")
    return found["figures"]


def completed(found: Any, defaults: Any) -> Any:
    """Settings with the fields that a newer version has, whose defaults change nothing."""
    if not (isinstance(found, dict) and isinstance(defaults, dict)):
        return found
    return defaults | {name: completed(x, defaults.get(name)) for name, x in found.items()}


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """As they are read again: tuples become lists."""
    return json.loads(json.dumps(settings))
