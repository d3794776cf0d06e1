"""Prints the table of benchmarks/aot.md: `var_jax.aot` for each row, two hours on one core.

    pip install -e '.[tpu]' && python benchmarks/aot.py --out /tmp/aot

The JSON of each row stays in the folder, so a stopped command continues.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
SLICES = [
    ("d16", "v5e:4x8"), ("d20", "v5e:8x8"), ("d24", "v5e:8x8"), ("d30", "v5e:8x16"),
    ("d30", "v5p:4x4x4"), ("d30", "v6e:8x8"), ("d36", "v5p:4x4x8"), ("d36", "v5e:16x16"),
]  # fmt: skip
ROWS = [
    *((*row, program) for row in SLICES for program in ("transformer", "pixels")),
    ("tokenizer:256_patchgan", "v5e:8x8", "tokenizer"), ("d16", "v5e:4x8", "sampler"),
    ("d30", "v5e:8x16", "sampler"), ("d16", "v5e:4x8", "features"),
]  # fmt: skip
HEAD = (
    "config", "topology", "mesh", "batch", "program", "memory a chip, GB", "cycles, M",
    "kernels charged, M", "efficiency", "images/s", "collectives a chip, GB", "compile, s",
)  # fmt: skip


def main() -> None:
    """Compiles the rows that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the rows")
    out = parser.parse_args().out
    print("|".join(["", *HEAD, ""]), "|".join(["", *["---"] * len(HEAD), ""]), sep="\n")
    for row in ROWS:
        print("|".join(["", *line(out, *row), ""]), flush=True)


def line(out: pathlib.Path, name: str, topology: str, program: str) -> list[str]:
    """The cells of one row."""
    path = out / f"{name}_{topology}_{program}.json".replace(":", "-")
    if not path.exists():
        config = name if ":" in name else f"imagenet:{name}"
        command = ["--config", config, "--topology", topology, "--program", program, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "var_jax.aot", *command],
            cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
    r = json.loads(path.read_text())
    memory = f"{r['bytes_per_chip'] / 1e9:.1f} of {r['memory_per_chip'] / 1e9:.1f}"
    first = [name, topology, r["mesh"], str(r["batch_size"]), program]
    last = f"{r['compile_seconds']:.0f}"
    if not r["fits"]:
        return [*first, f"{memory}: too much", *["-"] * 5, last]
    collectives = f"{r['collective_bytes'] / 1e9:.1f} ({r['collective_bytes_fsdp'] / 1e9:.1f})"
    return [
        *first, memory, f"{r['estimated_cycles'] / 1e6:.0f}",
        f"{r['kernel_cycles_charged'] / 1e6:.0f}", f"{r['efficiency']:.2f}",
        f"{r['images_per_second']:,.0f}", collectives, last,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
