"""Prints the tables of benchmarks/aot.md: `var_jax.aot` for each row, hours on two cores.

    pip install -e '.[tpu]' && python benchmarks/aot.py --out /tmp/aot

The JSON of each row stays in the folder, so a stopped command continues. All rows took seven hours
on two cores that other programs used too.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Row(NamedTuple):
    """A program of a config, with some of its fields changed."""

    config: str  # of configs/imagenet.py where it names no file
    topology: str
    program: str
    fields: tuple[str, ...] = ()
    note: str = ""  # what the fields change, for the table


NO_REMAT = ("transformer.remat=none",), "nothing recomputed"
BFLOAT16 = ("train_transformer.encoder_dtype=bfloat16",), "encoder in bfloat16"
FLOAT32 = ("train_tokenizer.dtype=float32",), "squared error alone, in float32"
ONE, EIGHT = (  # on each of four chips, which hold all weights
    (("mesh.fsdp=1", f"train_transformer.batch_size={4 * images}"), f"{text} a chip")
    for images, text in ((1, "one image"), (8, "eight images"))
)
TRAINING = (
    Row("d16", "v5e:4x8", "transformer"),
    Row("d16", "v5e:4x8", "transformer", *NO_REMAT),
    Row("d16", "v5e:4x8", "pixels"),
    Row("d16", "v5e:4x8", "pixels", *BFLOAT16),
    Row("d20", "v5e:8x8", "transformer"),
    Row("d20", "v5e:8x8", "pixels"),
    Row("d20", "v5e:8x8", "pixels", *BFLOAT16),
    Row("d24", "v5e:8x8", "transformer"),
    Row("d24", "v5e:8x8", "pixels"),
    Row("d30", "v5e:8x16", "transformer"),
    Row("d30", "v5e:8x16", "transformer", *NO_REMAT),
    Row("d30", "v5e:8x16", "pixels"),
    Row("d30", "v5p:4x4x4", "transformer"),
    Row("d30", "v5p:4x4x4", "pixels"),
    Row("d30", "v6e:8x8", "transformer"),
    Row("d30", "v6e:8x8", "transformer", *NO_REMAT),
    Row("d30", "v6e:8x8", "pixels"),
    Row("d36", "v5p:4x4x8", "transformer"),
    Row("d36", "v5p:4x4x8", "pixels"),
    Row("d36", "v5e:16x16", "transformer"),
    Row("d36", "v5e:16x16", "pixels"),
)
OTHERS = (
    Row("d20", "v5e:8x8", "tokenizer", *FLOAT32),
    Row("tokenizer:256_patchgan", "v5e:8x8", "tokenizer"),
    Row("d16", "v5e:4x8", "sampler"),
    Row("d30", "v5e:8x16", "sampler"),
    *(
        Row(name, "v5e:2x2", "sampler", *images)
        for name in ("d16", "d30")
        for images in (ONE, EIGHT)
    ),
    Row("d16", "v5e:4x8", "features"),
)
BASELINES = tuple(
    Row(f"baselines:{name}", "v5e:8x16", "transformer")
    for name in ("raster:227m", "raster:1.4b", "dit:xl2")
)
FIRST = "config", "topology", "mesh", "batch", "program", "memory a chip, GB"
OF_STEPS = (
    "cycles, M", "kernels charged, M", "efficiency", "images/s", "collectives a chip, GB",
    "compile, s",
)  # fmt: skip
OF_OTHERS = (
    "M cycles (products, elementwise, copies; kernels charged)", "seconds", "images/s a chip",
    "compile, s",
)  # fmt: skip


def main() -> None:
    """Compiles the rows that are missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the rows")
    out = parser.parse_args().out
    for rows, head, cells in (
        (TRAINING, OF_STEPS, of_step), (OTHERS, OF_OTHERS, of_other), (BASELINES, OF_STEPS, of_step)
    ):  # fmt: skip
        head = (*FIRST, *head)
        print("|".join(["", *head, ""]), "|".join(["", *["---"] * len(head), ""]), sep="\n")
        for row in rows:
            print("|".join(["", *line(row, report_of(row, out), cells), ""]), flush=True)
        print()


def report_of(row: Row, out: pathlib.Path) -> dict[str, Any]:
    """What `aot` reports of a row, now or before."""
    name = "_".join((row.config, row.topology, row.program, *row.fields)).replace(":", "-")
    path = out / f"{name}.json"
    if not path.exists():
        done = subprocess.run(
            [sys.executable, "-m", "var_jax.aot", *flags(row)],
            cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
    return json.loads(path.read_text())


def flags(row: Row) -> list[str]:
    """The flags of `aot` for a row."""
    config = row.config if ":" in row.config else f"imagenet:{row.config}"
    changed = [f"--config.{field}" for field in row.fields]
    place = ["--topology", row.topology, "--program", row.program]
    return ["--config", config, *changed, *place, "--json"]


def line(row: Row, report: dict[str, Any], cells: Any) -> list[str]:
    """The cells of one row."""
    memory = f"{report['bytes_per_chip'] / 1e9:.1f} of {report['memory_per_chip'] / 1e9:.1f}"
    program = ", ".join(filter(None, (row.program, row.note)))
    first = [
        row.config.removeprefix("baselines:"), row.topology, report["mesh"],
        str(report["batch_size"]), program,
    ]  # fmt: skip
    last = f"{report['compile_seconds']:.0f} ({report['compile_cpu_seconds']:.0f} of CPU)"
    if not report["fits"]:
        empty = len(OF_STEPS if cells is of_step else OF_OTHERS) - 1
        return [*first, f"{memory}: too much", *["-"] * empty, last]
    return [*first, memory, *cells(report), last]


def of_step(report: dict[str, Any]) -> list[str]:
    """What is said of a training step of the transformer."""
    charged, sent = report["kernel_cycles_charged"], report["collective_bytes"]
    return [
        millions(report["estimated_cycles"]), millions(charged), f"{report['efficiency']:.2f}",
        f"{report['images_per_second']:,.0f}",
        f"{sent / 1e9:.1f} ({report['collective_bytes_fsdp'] / 1e9:.1f})",
    ]  # fmt: skip


def of_other(report: dict[str, Any]) -> list[str]:
    """What is said of the other programs."""
    groups = ("matrix products", "elementwise and sums", "copies and layouts")
    parts = ", ".join(millions(report["cycles_by_group"].get(group, 0)) for group in groups)
    charged = millions(report["kernel_cycles_charged"])
    rate = report["images_per_second"] / report["chips"]
    cycles = f"{millions(report['estimated_cycles'])} ({parts}; {charged})"
    return [cycles, f"{report['step_seconds']:.3g}", f"{rate:.3g}"]


def millions(count: int) -> str:
    """A count in millions."""
    return f"{count / 1e6:.0f}"


if __name__ == "__main__":
    main()
