r"""Trains the ladder of configs/ladder.py: a tokenizer for all, its tokens, and every size.

    python benchmarks/ladder.py --out runs/ladder
    python benchmarks/ladder.py --out runs/ladder --two_seeds= --depths 1,2,3,4,5,6,8 \
        --budgets 0.25,0.35,0.5,0.8,0.9,2,4,8
    python benchmarks/ladder.py --out runs/rates --depths 2,4,8 --two_seeds= --factors 0.5,1,2 \
        --steps 600

A stopped command continues. The second adds, for isoFLOP curves, each size with as many steps as a
budget of TFLOPs allows, if that is at least 100 and at most two epochs. The third tries learning
rates beside the transferred one; of runs that differ in the rate alone, var_jax.scaling keeps the
best.
"""

import dataclasses
import itertools
import subprocess
import sys
import time

from absl import flags
from etils import epath

from var_jax.config import Config, from_dict
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.tools.files import output_path, read_json
from var_jax.tools.flops import transformer_flops
from var_jax.training.run import train

FEWEST_STEPS, EPOCH = 100, 60_000  # steps, images


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("out", "runs/ladder", "Folder of the runs.")
    flags.DEFINE_list("depths", ["2", "3", "4", "5", "6", "8"], "Sizes.")
    flags.DEFINE_list("two_seeds", ["2", "3", "4"], "Sizes that are trained with a second seed.")
    flags.DEFINE_list("factors", ["1"], "On the learning rate of each size.")
    flags.DEFINE_integer("steps", 0, "Of each size; 0: the config's.", 0)
    flags.DEFINE_list("budgets", None, "TFLOPs of training of each size, in place of --steps.")


def main(args: flags.FlagValues) -> None:
    """Trains what is missing, a line for each run."""
    out, configs = output_path(args.out), {}
    factors = cli.numbers("--factors", args.factors) or ()
    budgets = cli.numbers("--budgets", args.budgets or ["0"]) or ()
    for depth, factor, budget in itertools.product(args.depths, factors, budgets):
        for seed in range(2 if depth in args.two_seeds else 1):
            name = f"d{depth}-seed{seed}" + (f"-rate{factor:g}" if factor != 1 else "")
            configs[name] = config_of(out, depth, seed, factor, args.steps)
            if budget and (config := with_budget(configs.pop(name), budget)):
                configs[f"{name}-{budget:g}T"] = config
            elif budget:
                print(f"{name}: left out, {budget:g} TFLOPs are too few steps or too many epochs")
    prepare(out, 2 if args.two_seeds else 1)
    for name, config in configs.items():
        started = time.monotonic()
        train(config, out / name)  # of a finished run no step; one of another config is refused
        summary = read_json(out / name / "summary.json")
        loss = summary["validation loss (nats a token)"]
        print(f"{name}: validation loss {loss:.4f}, {time.monotonic() - started:.0f} s")


def prepare(out: epath.Path, seeds: int) -> None:
    """Trains the tokenizer and writes a token cache for each seed, unless they are there."""
    train(from_dict(Config, load_config("ladder:tokenizer")), out / "tokenizer")
    source = load_config("ladder:tokenizer").data.source
    for seed in range(seeds):
        words = ["--checkpoint", out / "tokenizer/checkpoint", "--images", source, "--resize", 1,
                 "--seed", seed, "--batch_size", 256, "--out", out / f"tokens-{seed}"]  # fmt: skip
        if code := subprocess.call([sys.executable, "-m", "var_jax.encode", *map(str, words)]):
            sys.exit(code)


def config_of(out: epath.Path, depth: str, seed: int, factor: float, steps: int) -> Config:
    """The config of one run."""
    config = load_config(f"ladder:{depth}")
    config.seed = seed
    config.pretrained_tokenizer = str(out / "tokenizer/checkpoint")
    config.data.tokens = str(out / f"tokens-{seed}")
    config.train_transformer.learning_rate *= factor
    if steps:
        config.train_transformer.steps = steps
        config.every.update(evaluate=max(1, steps // 5), save=steps)
    return from_dict(Config, config)


def with_budget(config: Config, budget: float) -> Config | None:
    """As many steps as `budget` TFLOPs allow, with one validation, at the end; None if too few."""
    training = config.train_transformer
    flops = transformer_flops(config.transformer) * training.batch_size
    steps = round(budget * 1e12 / flops)
    if not FEWEST_STEPS <= steps <= 2 * EPOCH // training.batch_size:
        return None
    replace = dataclasses.replace
    return replace(
        config,
        train_transformer=replace(training, steps=steps, warmup_steps=steps // 24),
        every=replace(config.every, evaluate=steps, save=steps),
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
