"""Compiles a config's train step for TPUs that are not there: does it fit, how fast should it be.

    python -m var_jax.aot --config imagenet:d30 --topology v5e:8x16 [--json]

The very step that training runs, on a CPU host, through libtpu (`pip install 'var_jax[tpu]'`).
Cycles are the TPU compiler's own estimate; attention kernels, which have none, are charged their
matrix products. Efficiency is against the estimate for one 8192³ bfloat16 product, 1.0: the time
that the model's operations would take at that rate, over the estimated time.
"""

import dataclasses
import json
from typing import Any

from absl import flags

from var_jax.config import Config, from_dict
from var_jax.sharding.mesh import make_mesh, sampling_mesh
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.training.aot import CHIPS, PROGRAMS, batch_of, examine, largest, tpu_devices


def define_flags() -> None:
    """Defines the flags of this command."""
    cli.define_config_flag()
    flags.DEFINE_string("topology", None, "Like v5e:8x16, v5p:4x4x4 or v6e:8x8.", required=True)
    flags.DEFINE_integer("slices", 1, "So many such slices; the config's mesh.data splits them.")
    flags.DEFINE_enum(
        "program", "transformer", PROGRAMS,
        "The transformer's step on cached tokens (of a dit: latents) or on pixels, the tokenizer's"
        " step, sampling, or the features of FID.",
    )  # fmt: skip
    flags.DEFINE_bool("largest_batch", False, "Also look for the largest batch that fits.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


def main(args: flags.FlagValues) -> None:
    """Compiles and prints."""
    config = from_dict(Config, load_config(args.config, args.config_field))
    devices = tpu_devices(args.topology, args.slices)
    if args.program == "sampler":
        mesh = sampling_mesh(config.mesh.fsdp, config.mesh.tensor, devices)
    else:
        mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    chip = CHIPS[args.topology.partition(":")[0]]
    report = examine(config, args.program, mesh, chip, batch_of(config, args.program))
    if args.largest_batch:
        report["largest_batch_per_chip"] = largest(config, args.program, mesh, chip, report)
    print(json.dumps(report) if args.json else table(report))


def table(report: dict[str, Any]) -> str:
    """The report for reading."""
    lines = []
    for name, value in report.items():
        if not isinstance(value, dict):
            lines += [f"{name:32s} {shown(name, value)}"]
        elif value:
            total = sum(value.values()) or 1
            lines += [f"{name}:"]
            lines += [f"  {k:30s} {v:>18,} {v / total:6.1%}" for k, v in value.items()]
    return "\n".join(lines)


def shown(name: str, value: Any) -> str:
    """A figure for reading, with its unit."""
    if value is None:
        return "-"
    if "bytes" in name or name == "memory_per_chip":
        return f"{value / 2**30:.2f} GiB"
    if name == "clock_hz":
        return f"{value / 1e9:g} GHz"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    cli.run(main, define_flags)
