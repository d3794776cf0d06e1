"""Figures as `evaluate` tells them: metrics.json, a table, and of a sweep a curve."""

import json
from typing import Any

from etils import epath

from var_jax.tools.files import replacing
from var_jax.tools.images import curves, going_on_without

HELD_OUT = "held-out images"


def write(out: epath.Path, found: dict[str, dict[str, float]], about: dict[str, Any]) -> None:
    """Prints the figures, and writes metrics.json and of a sweep curve.png."""
    single = found.pop("", None)
    with replacing(out / "metrics.json") as beside:
        text = (single or {}) | ({"sets": found} if found else {}) | about
        beside.write_text(json.dumps(text, indent=2) + "\n")
    points = [each for name, each in found.items() if name != HELD_OUT]
    if len(points) > 1 and about["flags"]["reference"]:
        x, y = ("inception_score", "fid") if "fid" in points[0] else list(points[0])[-1:-3:-1]
        line = [point[x] for point in points], [point[y] for point in points]
        with going_on_without("curve.png"):
            curves(out / "curve.png", {y: {"": line}}, x)
    print(table(({"samples": single} if single else {}) | found))
    print(f"figures are in {out / 'metrics.json'}")


def table(columns: dict[str, dict[str, float]]) -> str:
    """A line for each figure, a column for each set."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    width = max(map(len, names))
    head = " " * width + "".join(f"{name:>18}" for name in columns)
    cell = lambda value: f"{value:18.6g}" if value is not None else " " * 18
    rows = (
        f"{name:{width}}" + "".join(cell(column.get(name)) for column in columns.values())
        for name in names
    )
    return "\n".join([head, *rows] if len(columns) > 1 else rows)
