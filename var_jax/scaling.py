"""Fits scaling laws to trained transformers, as §5.2 of the VAR paper does.

    python -m var_jax.scaling --runs runs/ladder --out scaling

reads what trainings left (config.json, metrics.jsonl, summary.json): each of --runs is a work
directory, a folder of them, or a runs.csv of an earlier call. Loss and error of the validation set,
at the last scale and over all, become power laws of parameters and of compute; the irreducible
loss is fitted, not subtracted. Constants are printed with their intervals beside those of the
paper. Writes laws.png (the laws, the residual of the largest size predicted from the others,
isoFLOP curves), fit.json, and runs.csv with the points.
"""

import json

from absl import flags

from var_jax.evaluation.scaling_report import draw, make_report, summary, table
from var_jax.tools import cli
from var_jax.tools.files import output_folder, replacing
from var_jax.tools.images import going_on_without
from var_jax.training.results import read_rows, write_csv


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_multi_string(
        "runs", None, "Work directories, folders of them, or runs.csv files.", required=True
    )
    flags.DEFINE_string("out", "scaling", "Folder to write.")


def main(args: flags.FlagValues) -> None:
    """Reads the runs, fits, and writes figure, fit and points."""
    out = output_folder(args.out)
    rows = read_rows(args.runs)
    report = make_report(rows)
    fit, text = json.dumps(summary(report), indent=2), table(report)
    write_csv(out / "runs.csv", rows)
    with replacing(out / "fit.json") as beside:
        beside.write_text(fit + "\n")
    with going_on_without("laws.png"):
        draw(report, out / "laws.png")
    print(text)
    print(f"laws.png, fit.json and runs.csv are in {out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
