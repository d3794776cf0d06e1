"""The state dict that is meant, in whatever a file holds around it.

Trainers save state dicts inside dicts, beside those of an optimizer or an average, and with names
that DistributedDataParallel, torch.compile or an outer module have lengthened.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from var_jax import BadInput
from var_jax.checkpoints.torch.names import Tensors
from var_jax.tools.files import in_bucket, local_copy
from var_jax.tools.paths import user_path

WRAPPERS = ("module", "_orig_mod")  # parts of a name that only say how the module was run
MAX_LISTED = 8


def file_and_key(text: str | Path) -> tuple[Path, str]:
    """A file, and the key of FILE:KEY where there is no file of that whole name.

    Of a file in a bucket it is the `local_copy`.
    """
    path = user_path(text)
    name, _, key = str(path).rpartition(":")
    # "gs" of gs://... is no name.
    if name and in_bucket(name) == in_bucket(path) and not path.exists():
        return local_copy(name), key
    return local_copy(path), ""


def find_state_dict(path: Path, content: Any, key: str = "", mark: str = "") -> Tensors:
    """The tensors by name of the only state dict in `content`, or of the one called `key`.

    Only one that has a tensor `mark` fits; `key` is its place, like "model" or "trainer.ema".

    Raises: BadInput, with the keys to choose from, if none or several fit.
    """
    dicts = dict(state_dicts(content))
    found = {}
    for place, tensors in dicts.items():
        tensors = unwrapped(path, tensors)
        for name in (name for name in tensors if mark and f".{name}".endswith(f".{mark}")):
            prefix = name.removesuffix(mark)
            inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            found[".".join(filter(None, (place, prefix[:-1])))] = inside
    found = found or {place: unwrapped(path, tensors) for place, tensors in dicts.items()}
    if not found:
        raise BadInput(f"{path} holds no tensors by name{listed(content)}; expected a state dict.")
    if key or len(found) > 1:
        keys = ", ".join(repr(place) for place in [*found][:MAX_LISTED] if place)
        if key not in found or not key:
            raise BadInput(
                f"{path} holds {len(found)} state dicts{f', but not {key!r}' if key else ''}:"
                f" expected one of {keys}, as in {path}:{next(filter(None, found), '')}."
            )
    return found[key or next(iter(found))]


def state_dicts(content: Any) -> Iterator[tuple[str, Mapping]]:
    """(place, state dict) of every dict in nested dicts that holds tensors by name."""
    waiting, seen = [("", content)], set()
    while waiting:
        place, value = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue  # a dict may hold itself
        seen.add(id(value))
        if any(is_tensor(name, x) for name, x in value.items()):
            yield place, {name: x for name, x in value.items() if is_tensor(name, x)}
        waiting += [(f"{place}.{name}".lstrip("."), inner) for name, inner in value.items()]


def is_tensor(name: Any, value: Any) -> bool:
    """Whether this entry of a dict is a tensor with a name."""
    return isinstance(name, str) and hasattr(value, "dtype") and hasattr(value, "shape")


def unwrapped(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without `WRAPPERS` in their names. Raises: BadInput if two names become one."""
    names = {n: ".".join(p for p in n.split(".") if p not in WRAPPERS) for n in tensors}
    first: dict[str, str] = {}
    for name, bare in names.items():
        if (other := first.setdefault(bare, name)) != name:
            raise BadInput(f"{path} holds {name!r} and {other!r}; expected one of the two.")
    return {names[n]: tensor for n, tensor in tensors.items()}


def listed(content: Any) -> str:
    """What a file holds instead, for a sentence."""
    if not isinstance(content, Mapping):
        return f", but an object of type {kind(content)}"
    some = [f"{name!r} of type {kind(value)}" for name, value in content.items()]
    return f", but {', '.join(some[:MAX_LISTED])}" if some else ""


def kind(value: Any) -> str:
    """The type of an object, as its file calls it."""
    return getattr(value, "kind", type(value).__name__.lower())
