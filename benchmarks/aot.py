"""Writes the table of benchmarks/aot.md: `var_jax.aot` for each row, two hours on one core.

    pip install -e '.[tpu]' && python benchmarks/aot.py --out /tmp/aot

Each row's JSON goes to the folder and is not made again, so a stopped run goes on.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

OUT = flags.DEFINE_string("out", None, "Folder of the rows.", required=True)
ROOT = pathlib.Path(__file__).parents[1]
SLICES = [
    ("d16", "v5e:4x8"), ("d20", "v5e:8x8"), ("d24", "v5e:8x8"), ("d30", "v5e:8x16"),
    ("d30", "v5p:4x4x4"), ("d30", "v6e:8x8"), ("d36", "v5p:4x4x8"), ("d36", "v5e:16x16"),
]  # fmt: skip
ROWS = [
    *((*row, program) for row in SLICES for program in ("transformer", "pixels")),
    ("tok", "v5e:8x8", "tokenizer"), ("d16", "v5e:4x8", "sampler"), ("d30", "v5e:8x16", "sampler"),
]  # fmt: skip
HEAD = (
    "config", "topology", "mesh", "batch", "program", "memory a chip, GB", "cycles, M",
    "kernels charged, M", "efficiency", "images/s", "collectives a chip, GB", "compile, s",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Makes the rows that are missing and prints the table."""
    del argv
    print("|".join(["", *HEAD, ""]), "|".join(["", *["---"] * len(HEAD), ""]), sep="\n")
    for row in ROWS:
        print("|".join(["", *line(*row), ""]), flush=True)


def line(name: str, topology: str, program: str) -> list[str]:
    """The cells of one row."""
    path = pathlib.Path(OUT.value) / f"{name}_{topology.replace(':', '-')}_{program}.json"
    if not path.exists():
        config = "tokenizer.py:256" if name == "tok" else f"imagenet.py:{name}"
        command = ["--config", f"configs/{config}", "--topology", topology, "--program", program]
        made = subprocess.run(
            [sys.executable, "-m", "var_jax.aot", *command, "--json"], cwd=ROOT, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made.stdout)
    r = json.loads(path.read_text())
    of = f" of {r['memory_per_chip'] / 1e9:.1f}"
    if not r["fits"]:
        wanted = f"{r['bytes_per_chip'] / 1e9:.1f}{of}: too much"
        measured = [wanted, *["-"] * 5]
    else:
        measured = [
            f"{r['bytes_per_chip'] / 1e9:.1f}{of}", f"{r['estimated_cycles'] / 1e6:.0f}",
            f"{r['kernel_cycles_charged'] / 1e6:.0f}", f"{r['efficiency']:.2f}",
            f"{r['images_per_second']:,.0f}",
            f"{r['collective_bytes'] / 1e9:.1f} ({r['collective_bytes_fsdp'] / 1e9:.1f})",
        ]  # fmt: skip
    first = ["tokenizer" if name == "tok" else name, topology, r["mesh"], str(r["batch_size"])]
    return [*first, program, *measured, f"{r['compile_seconds']:.0f}"]


if __name__ == "__main__":
    app.run(main)
