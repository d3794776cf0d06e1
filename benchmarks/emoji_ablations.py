r"""Changes of the emoji config, one at a time, each after the same number of images.

    pip install -e '.[report]'
    python benchmarks/emoji_ablations.py --out /tmp/tokenizers
    python benchmarks/emoji_ablations.py --out /tmp/transformers --steps 200 \
        --tokenizer runs/emoji/checkpoint

The first trains tokenizers, beside k-means on patches with as many codes. The second trains
transformers on the tokenizer of a finished run. A row is a run in a folder of OUT; a stopped
command continues.
"""

import json
from statistics import mean, median

import numpy as np
from absl import flags
from etils import epath
from sklearn.cluster import MiniBatchKMeans

from var_jax.config import Config, from_dict
from var_jax.data.sources import open_source
from var_jax.evaluation.pixel_report import arrays
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.training.run import train

TOKENIZER = (
    "",
    "train_tokenizer.codebook_decay=0",
    "tokenizer.patch_size=4 tokenizer.patch_nums=1,2,4,8",
    "tokenizer.patch_nums=1,1,2,2,4",
    "tokenizer.patch_nums=1,1,2,2,4,4,4",
    "tokenizer.latent_dim=48",
    "tokenizer.latent_dim=192",
    "tokenizer.vocab_size=2048",
)
TRANSFORMER = (
    "",
    "train_transformer.token_noise=0",
    "data.flip=false",
    "train_transformer.batch_size=16",
    "train_transformer.batch_size=64",
    "train_transformer.schedule=cos",
    "train_transformer.learning_rate=3.2e-2",
    "train_transformer.learning_rate=8e-3",
    "transformer.width=128 transformer.num_heads=2",
    "transformer.width=256 transformer.num_heads=4",
    "transformer.depth=2",
    "transformer.depth=8",
)
FIGURES = (
    "validation PSNR (dB)", "validation loss (nats a token)",
    "class agreement, samples / validation", "distance within a class, samples",
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder of the runs.", required=True)
    flags.DEFINE_string("tokenizer", "", "Checkpoint; trains transformers on its tokens.")
    flags.DEFINE_integer("steps", 500, "Of 32 images; other batch sizes take as many images.")
    flags.DEFINE_string("only", "", "Only changes that contain this.")


def main(args: flags.FlagValues) -> None:
    """Trains what is missing and prints a row for each change."""
    if not args.tokenizer:
        print(f"| k-means on patches | {kmeans_psnr(config_of('', args)):.2f} dB |", flush=True)
    for change in TRANSFORMER if args.tokenizer else TOKENIZER:
        if args.only in change:
            workdir = epath.Path(args.out) / (change.replace(" ", "+") or "as_configured")
            if not (workdir / "summary.json").exists():
                train(config_of(change, args), workdir)
            print(f"| {change or 'as configured'} | {' | '.join(cells(workdir))} |", flush=True)


def config_of(change: str, args: flags.FlagValues) -> Config:
    """The emoji config with a change, for one of the two trainings."""
    if args.tokenizer:
        fields = [f"pretrained_tokenizer={args.tokenizer}", "train_tokenizer.steps=0"]
    else:
        fields = ["train_transformer.steps=0", "sampling.top_p=1"]
    config = load_config("emoji", [*fields, *change.split()])
    training = config.train_transformer if args.tokenizer else config.train_tokenizer
    training.steps = 32 * args.steps // training.batch_size
    return from_dict(Config, config)


def cells(workdir: epath.Path) -> list[str]:
    """The figures of a finished run, its last training losses, and its speed."""
    summary = json.loads((workdir / "summary.json").read_text())
    records, paces = (
        [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "speed.jsonl")
    )
    losses = [r["loss"] for r in records if "loss" in r]
    found = [f"{name} {summary[name]:.2f}" for name in FIGURES if name in summary]
    found.append(f"last training losses {mean(losses[-max(len(losses) // 20, 1) :]):.3f}")
    pace = median(r["images_per_second"] for r in paces)
    return [*found, f"{1000 / pace:.1f} ms an image"]


def kmeans_psnr(config: Config) -> float:
    """Mean PSNR of validation images when each patch is replaced by the nearest of k-means."""
    tokenizer, data = config.tokenizer, config.data
    training, validation = (
        arrays(open_source(data.source, split, data.size))[0] for split in ("train", "validation")
    )
    codes = MiniBatchKMeans(tokenizer.vocab_size, batch_size=8192, n_init=1, random_state=0)
    codes.fit(patches(training, tokenizer.patch_size))
    wanted = patches(validation, tokenizer.patch_size)
    errors = (wanted - codes.cluster_centers_[codes.predict(wanted)]) ** 2
    return float(np.mean(-10 * np.log10(errors.reshape(len(validation), -1).mean(1))))


def patches(images: np.ndarray, side: int) -> np.ndarray:
    """(N·patches, side·side·3), in [0, 1]."""
    N, H, W, _ = images.shape
    x = images.reshape(N, H // side, side, W // side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * side * 3).astype(np.float32) / 255


if __name__ == "__main__":
    cli.run(main, define_flags)
