"""Figures as `evaluate` tells them: metrics.json, a table, and of a sweep a curve."""

import contextlib
import itertools
import json
from typing import Any

from etils import epath

from var_jax import BadInput
from var_jax.tools.files import read_json, replacing
from var_jax.tools.images import curves, going_on_without

HELD_OUT = "held-out images"
MADE_BY = ("version", "commit", "jax", "devices")  # keys that tell no figures from others


def save(out: epath.Path, found: dict[str, dict[str, float]], about: dict[str, Any]) -> None:
    """Writes the figures to metrics.json, and of a sweep curve.png.

    Of the same sets what `out` has stays where `found` has nothing yet. Figures of something else
    are kept beside, as metrics-1.json and so on.
    """
    then = keep_others(out, about)
    sets = then.get("sets", {}) | {name: each for name, each in found.items() if name}
    with replacing(out / "metrics.json") as beside:
        text = found.get("", {}) | ({"sets": sets} if sets else {}) | about
        beside.write_text(json.dumps(text, indent=2) + "\n")
    points = {name: each for name, each in sets.items() if name != HELD_OUT}
    if len(points) > 1 and about["flags"]["reference"]:
        first = next(iter(points.values()))
        x, y = ("inception_score", "fid") if "fid" in first else list(first)[-1:-3:-1]
        line = [each[x] for each in points.values()], [each[y] for each in points.values()]
        named = {name: ([each[x]], [each[y]]) for name, each in points.items()}
        with going_on_without("curve.png"):
            curves(out / "curve.png", {y: {"": line} | named}, x)


def show(out: epath.Path, found: dict[str, dict[str, float]]) -> None:
    """Prints the figures, and where they are."""
    print(table({name or "samples": each for name, each in found.items()}))
    print(f"figures are in {out / 'metrics.json'}")


def keep_others(out: epath.Path, about: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json holds of the same flags, weights and images; of others it is renamed."""
    path, then = out / "metrics.json", {}
    if not path.exists():
        return {}
    with contextlib.suppress(BadInput):  # damaged: of nothing that is known
        then = read_json(path)
    now = json.loads(json.dumps(about))
    if all(then.get(name) == now[name] for name in now.keys() - {*MADE_BY}):
        return then
    names = (out / f"metrics-{number}.json" for number in itertools.count(1))
    other = next(name for name in names if not name.exists())
    path.rename(other)
    print(f"the figures that were there are of something else; they are now in {other}")
    return {}


def table(columns: dict[str, dict[str, float]]) -> str:
    """A line for each figure, a column for each set."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    width = max(map(len, names))
    head = " " * width + "".join(f"{name:>18}" for name in columns)
    cell = lambda value: (
        " " * 18 if value is None else f"{value:18{',' if type(value) is int else '.6g'}}"
    )
    rows = (
        f"{name:{width}}" + "".join(cell(column.get(name)) for column in columns.values())
        for name in names
    )
    return "\n".join([head, *rows] if len(columns) > 1 else rows)
