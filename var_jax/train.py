"""Trains a tokenizer, then a transformer on its tokens.

    python -m var_jax.train --config emoji [--workdir DIR] [--config.a.b=v]

The same command continues a stopped run. It leaves in the work directory: checkpoint/ (what the
other commands read), reconstructions.png, samples.png, curves.png, summary.json, metrics.jsonl and
speed.jsonl, tensorboard/; and to continue from: config.json, tokenizer/, transformer/.
"""

import jax
from absl import flags

from var_jax.config import Config, from_dict
from var_jax.sharding import hosts
from var_jax.tools import cli
from var_jax.tools.configs import config_name, load_config
from var_jax.tools.files import output_path
from var_jax.training.run import train


def define_flags() -> None:
    """Defines the flags of this command."""
    cli.define_config_flag()
    flags.DEFINE_string("workdir", None, "Default: runs/NAME of the config.")
    flags.DEFINE_integer("profile", 0, "Number of steps to trace, starting at the tenth.")
    hosts.define_flags()


def main(args: flags.FlagValues) -> None:
    """Trains and prints what the run found."""
    hosts.join(args)  # ahead of the config: all end with the sentence of one that cannot read it
    config = from_dict(Config, load_config(args.config, args.config_field))
    default = f"runs/{config_name(args.config)}"
    workdir = output_path(default if args.workdir is None else args.workdir, "--workdir")
    summary = train(config, workdir, profile=args.profile)
    if jax.process_index() == 0:
        print("\n".join(f"{name:32s} {value:.4g}" for name, value in summary.items()))
        print(f"images and checkpoint are in {workdir}")


if __name__ == "__main__":
    cli.run(main, define_flags)
