"""Which class a label means: one rule for flags and the library."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from var_jax import BadInput

Label = str | int | np.integer | np.str_


def class_index(names: Sequence[str], label: Label | object, what: str = "label") -> int:
    """The number of the class that `label` means, of classes called `names`.

    A number is a number. Text is a name as it is written, else in other case, else a number;
    "name=1" and "number=1" say which.

    Raises: BadInput, which calls the argument `what`, if no class is meant, or maybe several.
    """
    if isinstance(label, bool) or not isinstance(label, (str, int, np.integer)):
        raise BadInput(f"{what} holds {label!r}; expected a class name or number.")
    if not isinstance(label, str) and abs(int(label)) > 10**9:  # maybe too large to be written
        raise BadInput(f"{what} holds a number beyond 10^9; classes are 0 to {len(names) - 1}.")
    text = label if isinstance(label, str) else f"number={label}"
    found = meanings(names, text)
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{what} holds {label!r}, which may mean {_readings(names, text, found)}.")
    if re.fullmatch(r"(number=)?[+-]?\d+", text):
        raise BadInput(f"{what} holds {label}; classes are 0 to {len(names) - 1}.")
    some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise BadInput(f"{what} holds {label!r}; the classes of this checkpoint are {some}.")


def meanings(names: Sequence[str], text: str) -> list[int]:
    """The numbers of all classes that `text` may mean."""
    exact = [i for i, name in enumerate(names) if name == text]
    kind, _, rest = text.partition("=")
    if not exact and kind == "name":
        return _named(names, rest)
    number = _number(rest if kind == "number" and not exact else text)
    places = [number] if 0 <= number < len(names) else []
    if not exact and kind == "number":
        return places
    named = exact or _named(names, text)
    if number >= 0 and not named:  # "1" may mean the class "01", too
        named = [i for i, name in enumerate(names) if _number(name) == number]
    return [*dict.fromkeys(named + places)]


def _number(text: str) -> int:
    """The number that a text is, or -1."""
    return int(text) if re.fullmatch(r"\+?[0-9]{1,9}", text) else -1


def _named(names: Sequence[str], text: str) -> list[int]:
    """Classes of this name, or else of this name in other case."""
    fold = lambda name: unicodedata.normalize("NFC", name).strip().casefold()
    exact = [i for i, name in enumerate(names) if name == text]
    return exact or [i for i, name in enumerate(names) if fold(name) == fold(text)]


def _readings(names: Sequence[str], text: str, found: Sequence[int]) -> str:
    """What a text may mean, and how to say each."""
    twice = len({names[i] for i in found}) < len(found)
    by_number = lambda i: f"class number {i}, {names[i]!r} (say number={i})"
    by_name = lambda i: f"the class {names[i]!r} (say name={names[i]})"
    ways = [by_number(i) if twice or i == _number(text) else by_name(i) for i in found[:4]]
    return " or ".join(ways)
