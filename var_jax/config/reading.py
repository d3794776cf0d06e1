"""Configs from and to nested dicts: the files in `configs/`, flags, and old checkpoints."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config.experiment import SHARED, Config
from var_jax.schedule import Schedule, Size

T = TypeVar("T")


def defaults() -> ConfigDict:
    """Every field of `Config` at its default, so that a flag can set also what a file does not.

    In `sampling` and `data` one number may stand for a tuple, which ConfigDict would refuse;
    `from_dict` checks the types.
    """
    fields = settings(Config())
    loose = {name: ConfigDict(fields[name], type_safe=False) for name in ("sampling", "data")}
    return ConfigDict(fields | loose)


def settings(config: Config) -> dict[str, Any]:
    """The fields of an experiment as nested dicts, each said once."""
    fields = dataclasses.asdict(config)
    for name in SHARED:
        del fields["transformer"][name]
    return fields


def bound_value(name: str, value: Any) -> Any:
    """What of the value of a field a.b of `Config` must stay, once its training has begun."""
    section: Any = Config
    binds = lambda value: value
    for part in name.split("."):
        found = {known.name: known for known in dataclasses.fields(section)}[part]
        section = type(found.default)
        binds = found.metadata.get("binds", binds)
    return binds(value)


def from_dict(cls: type[T], section: Any, name: str = "config") -> T:
    """Builds a frozen config, nested ones included, from an experiment's (section of a) config.

    Raises: BadInput naming the field for an unknown field, a value of the wrong type or range.
    """
    if hasattr(section, "to_dict"):  # a missing file's stand-in raises here what was wrong
        section = section.to_dict()  # type: ignore[union-attr]
    if not isinstance(section, Mapping):
        raise BadInput(f"{name}={section!r}; expected the fields of {cls.__name__}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in section.items():
        if key not in fields:
            raise BadInput(f"{name} has no field {key!r}; its fields are {', '.join(fields)}.")
        default = fields[key].default
        if dataclasses.is_dataclass(default):
            inside = key if name == "config" else f"{name}.{key}"
            values[key] = from_dict(type(default), value, inside)
        else:
            values[key] = _coerce(f"{name}.{key}", value, default, fields[key].type)
    try:
        return cls(**values)
    except BadInput as error:  # begins with the field
        raise BadInput(f"{name}.{error}") from None


def _coerce(name: str, value: Any, default: Any, declared: Any) -> Any:
    """`value` as the type of `default`; an int may be a float, a list or one number a tuple.

    A field that is declared a Size or a Schedule holds sides or pairs (height, width).
    """
    if declared == Schedule or (declared == Size and isinstance(value, (list, tuple))):
        return _coerce_sizes(name, value, default)
    if isinstance(default, tuple):
        values = value if isinstance(value, (list, tuple)) else (value,)
        kind, called = (int, "integers") if type(default[0]) is int else (float, "numbers")
        if all(type(v) in (int, kind) and math.isfinite(v) for v in values):
            return tuple(map(kind, values))
        raise BadInput(f"{name}={value!r} must be a tuple of {called}, like {default}.")
    if type(default) is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
        raise BadInput(f"{name}={value} must be a finite number, like {default!r}.")
    if type(value) is not type(default):
        raise BadInput(
            f"{name}={value!r} is of type {type(value).__name__}, expected"
            f" {type(default).__name__}, like {default!r}."
        )
    return value


def _coerce_sizes(name: str, value: Any, default: Size | Schedule) -> Size | Schedule:
    """A schedule, or if the default is one a size, with tuples in place of lists."""
    several = isinstance(default, tuple)
    values = value if several and isinstance(value, (list, tuple)) else (value,)
    values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    for size in values:
        sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
        if not all(type(side) is int for side in sides):
            wanted = "a tuple of integers or pairs" if several else "an integer or a pair"
            raise BadInput(f"{name}={value!r} must be {wanted} (height, width), like {default}.")
    return values if several else values[0]
