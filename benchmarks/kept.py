"""Figures of a study that may stop and continue: each is computed once."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from var_jax import BadInput
from var_jax.tools.files import read_json, replacing


def kept(
    path: epath.Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The figures in the file `path`, computed and written where it is missing.

    Raises: BadInput if the file is of other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = compute()
        with replacing(path) as beside:
            beside.write_text(json.dumps({"figures": figures, "settings": settings}, indent=2))
    found = read_json(path)
    for name, value in json.loads(json.dumps(settings)).items():  # tuples become lists
        if (there := found["settings"].get(name)) != value:
            raise BadInput(f"{path} is of {name}={there}, not {value}; name another --out.")
    return found["figures"]
