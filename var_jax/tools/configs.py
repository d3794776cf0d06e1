"""Config files of experiments: found by name or path, changed field by field."""

import ast
import difflib
import math
import re
import runpy
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.tools.paths import user_path

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of a wheel, of a clone
EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number"}


def load_config(spec: str, fields: Iterable[str] = ()) -> ConfigDict:
    """The config `NAME[:VARIANT]`, with `fields` such as "train_tokenizer.steps=10" changed.

    NAME is a file of configs/ without its .py ("emoji"), or the path of a file.

    Raises: BadInput for an unknown config, field, or a value of another type.
    """
    path, variant = _find(spec)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise BadInput(f"--config: {path} defines no function get_config.")
        config = get_config(variant) if variant else get_config()
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(_where(path, error)) from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise BadInput(f"--config: get_config of {path} returns a {kind}; expected a ConfigDict.")
    for field in fields:
        _change(config, *field.partition("=")[::2])
    return config


def _where(path: Path, error: Exception) -> str:
    """A sentence that says what went wrong in a config file, and in which line."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if frames[-1][0].f_globals.get("__name__", "").startswith("ml_collections.config_dict"):
        said = "a value of another type"  # instead of its many lines
    else:
        said = " ".join(f"{type(error).__name__}: {error}".split())
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    line = lines[-1] if lines else None
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    if not line:
        return f"{path}: {said}."
    text = path.read_bytes().decode(errors="replace").splitlines()[line - 1]
    return f"{path}, line {line}: {said} in {' '.join(text.split())!r}."


def config_name(spec: str) -> str:
    """A name for the runs of a config: "emoji-large" for emoji:large and configs/emoji.py:large."""
    name, variant = _split(spec)
    return "-".join(filter(None, (Path(name).stem, *re.findall(r"[\w.]*\w", variant))))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that offers the nearest known name; empty if none is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _split(spec: str) -> tuple[str, str]:
    """Name or path, and variant; a path may hold colons itself."""
    path = re.fullmatch(r"(.*\.py)(?::(.*))?", spec, re.DOTALL)
    name, _, variant = spec.partition(":")
    return (path[1], path[2] or "") if path else (name, variant)


def _find(spec: str) -> tuple[Path, str]:
    name, variant = _split(spec)
    if spec.endswith(":"):  # such as finetune:$UNSET, which would start from another checkpoint
        raise BadInput(f"--config={spec}: nothing follows the colon; expected NAME:VARIANT.")
    is_path = name.endswith(".py") or "/" in name
    places = [folder / f"{name}.py" for folder in FOLDERS]
    if is_path:
        places = [Path(user_path(name, "--config"))]
    for path in places:
        if path.is_file():
            return path, variant
    known = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.py")})
    found = f"{places[0]}: no such file" if is_path else f"{spec}: no such config"
    expected = f"{', '.join(known)}, or the path of a .py file"
    raise BadInput(f"--config={found}; expected one of {expected}.")


def _change(config: Any, name: str, text: str) -> None:
    """Sets the field a.b.c of `config` from text, keeping its type."""
    *sections, field = name.split(".")
    for part in (*sections, field):
        if not isinstance(config, ConfigDict) or part not in config:
            known = config if isinstance(config, ConfigDict) else ()
            raise BadInput(f"--config has no field {part!r}{did_you_mean(part, known)}")
        section, config = config, config[part]
    try:
        section[field] = _parsed(text, config)
    except (ValueError, SyntaxError, TypeError) as error:
        if isinstance(config, ConfigDict):
            kind = f"one of its fields, as in --config.{name}.{next(iter(config), 'a')}"
        else:
            kind = f"{EXPECTED.get(type(config), 'a value')}, like {config!r}"
        raise BadInput(f"--config.{name}={text}; expected {kind}.") from error


def _parsed(text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`; one number may stand for a tuple."""
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        text = (text or "true").capitalize()
    value = ast.literal_eval(text)
    if isinstance(old, tuple):
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if isinstance(value, tuple) and type(old) is int:  # (height, width): of a size and no other
        return value
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(text)
    return value
