"""What keeps a tokenizer's codebook in use: options on and off at equal steps, over seeds.

    python benchmarks/collapse.py --out runs/collapse
    python benchmarks/collapse.py --out runs/collapse --datasets fashion --options default,rotation

Each run trains a tokenizer and a small transformer on its codes, and is measured on held-out
images: use and perplexity of the codes at each scale, PSNR and LPIPS after each scale, and, in the
features of EfficientNet-Lite0, the Fréchet distances of reconstructions (rFD), of images whose
codes were perturbed (pFD) and of samples (FD); "fair" is the lowest perplexity of a scale over its
share of the codes, all of them over the number of scales. A stopped command goes on, and a second
one adds its runs to the first one's. Writes runs.csv, table.md and a PNG for each dataset.
"""

import csv
import functools
from statistics import mean, stdev
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from kept import kept

from var_jax import BadInput
from var_jax.config import Config, from_dict, settings
from var_jax.data.sources import open_source
from var_jax.evaluation.features import EFFICIENTNET, Network, extract, load_network
from var_jax.evaluation.image_sets import SourceImages
from var_jax.evaluation.quality import distance, reference_of
from var_jax.evaluation.tokenizer import Perturbed, Reconstructions, similarities
from var_jax.models.features.lpips import load_lpips
from var_jax.models.tokenizer import Tokenizer, decode_scales, encode_images
from var_jax.sampling.exports import load_models, load_tokenizer
from var_jax.sharding.mesh import using
from var_jax.sharding.rows import in_batches
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.tools.files import output_path, read_json, replacing
from var_jax.tools.images import charts, save_charts
from var_jax.tools.npz import NpzImages, save_npz
from var_jax.training.hooks import draw_samples
from var_jax.training.run import train

DATASETS = {"fashion": "fashion", "emoji": "emoji:64"}  # and their configs
DEFAULT = "train_tokenizer.restart_by_scale=false train_tokenizer.codebook_restart=0.03"
OPTIONS = {
    "default": "",  # moving averages with restarts
    "no_restart": "train_tokenizer.codebook_restart=0",
    "restart_by_scale": "train_tokenizer.restart_by_scale=true",
    "gradient": "train_tokenizer.codebook_decay=0",
    "gradient_no_restart": "train_tokenizer.codebook_decay=0 train_tokenizer.codebook_restart=0",
    "entropy": "train_tokenizer.entropy_weight=0.05 train_tokenizer.codebook_decay=0",
    "kmeans": "train_tokenizer.kmeans_steps=20",
    "scale_dropout": "train_tokenizer.scale_dropout=0.1",
    "perturbation": "train_tokenizer.perturbation=0.1",
    "rotation": "train_tokenizer.rotation=true",
    "single_scale": "tokenizer.patch_nums={last} train_transformer.steps=0 sampling.top_p=0",
}
DRAWN = (*OPTIONS, "entropy_moving_average")  # of collapse/runs.csv, which is refused today
FIGURES = ("psnr", "lpips", "used", "fair", "rfd", "pfd", "fd")  # of table.md
BY_SCALE = {  # of the PNGs
    "psnr_scale": "PSNR after each scale, dB",
    "lpips_scale": "LPIPS after each scale",
    "used_scale": "share of the codes in use",
    "perplexity_scale": "perplexity of the codes",
}


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("out", "runs/collapse", "Folder of the runs and the figures.")
    flags.DEFINE_list("datasets", list(DATASETS), "Of fashion and emoji.")
    flags.DEFINE_list("options", list(OPTIONS), "What is changed, one in a run.")
    flags.DEFINE_integer("seeds", 3, "Runs of each option.", 1)
    flags.DEFINE_integer("steps", 500, "Of each tokenizer.", 1)
    flags.DEFINE_integer("transformer_steps", 150, "Of each transformer.", 0)
    flags.DEFINE_integer("num", 500, "Held-out images, and samples, of each run.", 4)


def main(args: flags.FlagValues) -> None:
    """Trains and measures what is missing, and writes what there is."""
    for name, known in (("datasets", DATASETS), ("options", OPTIONS)):
        if wrong := sorted({*args[name].value} - {*known}):
            raise BadInput(f"--{name}={wrong[0]}; expected of {', '.join(known)}.")
    out, network = output_path(args.out), load_network(EFFICIENTNET)
    for seed in range(args.seeds):  # so that a stopped study compares what it has
        for dataset in args.datasets:
            for option in args.options:
                folder = out / dataset / f"{option}-{seed}"
                config = config_of(args, dataset, option, seed)
                about = settings(config) | {"num": args.num}
                work = functools.partial(trained_and_measured, config, folder, args.num, network)
                kept(folder / "figures.json", about, work)
                print(f"{folder} is there", flush=True)
    write(out)


def trained_and_measured(
    config: Config, folder: epath.Path, num: int, network: Network
) -> dict[str, Any]:
    """Trains what a config says, and measures it."""
    train(config, folder / "run")
    return measure(config, folder, num, network)


def config_of(args: flags.FlagValues, dataset: str, option: str, seed: int) -> Config:
    """The config of a run: the dataset's, shorter, and with a smaller transformer."""
    last = load_config(DATASETS[dataset]).tokenizer.patch_nums[-1]
    fields = [
        f"seed={seed}", f"train_tokenizer.steps={args.steps}",
        f"train_transformer.steps={args.transformer_steps}", "transformer.depth=2",
        "transformer.width=128", "transformer.num_heads=2", "export_dtype=float32",
        f"every.save={max(args.steps, args.transformer_steps)}", "every.evaluate=0",
        "every.sample=0", *DEFAULT.split(), *OPTIONS[option].format(last=last).split(),
    ]  # fmt: skip
    config = load_config(DATASETS[dataset], fields)
    config.report = ""
    return from_dict(Config, config)


def measure(config: Config, folder: epath.Path, num: int, network: Network) -> dict[str, Any]:
    """All figures of a finished run."""
    size, checkpoint, features = config.data.size, folder / "run/checkpoint", folder / "features"
    source = open_source(config.data.source, "validation", size, resize=1.0)
    images, tokenizer = SourceImages(source, num), load_tokenizer(checkpoint)
    with using(None):
        compare = similarities({"lpips": load_lpips("alex")})
        again = Reconstructions(tokenizer, images, compare=compare)
        originals, made = (extract(network, each, features) for each in (images, again))
        reference = reference_of(originals)
        found = again.figures() | after_each_scale(tokenizer, images, compare)
        scales, codes = len(config.tokenizer.patch_nums), config.tokenizer.vocab_size
        least = min(found[f"perplexity_scale{k + 1}"] for k in range(scales))
        found["fair"] = least / (codes / scales)  # the scales share the codes
        perturbed = extract(network, Perturbed(again), features)
        found |= {"rfd": distance(made, reference), "pfd": distance(perturbed, reference)}
        if config.train_transformer.steps:
            models, path = load_models(checkpoint), folder / "samples.npz"
            labels = np.resize(np.arange(len(models.class_names), dtype=np.int32), num)
            save_npz(path, arr_0=draw_samples(models, labels, config.seed))
            found["fd"] = distance(extract(network, NpzImages(path), features), reference)
    return found


def after_each_scale(tokenizer: Tokenizer, images: SourceImages, compare: Any) -> dict[str, float]:
    """Means over images of what `compare` finds after each scale."""
    sums: dict[str, float] = {}
    for batch in images.batches(64):
        tokens = in_batches(encode_images, tokenizer, batch)
        steps = in_batches(decode_scales, tokenizer, tokens)
        for k in range(steps.shape[1]):
            for name, values in compare(batch, steps[:, k]).items():
                key = f"{name}_scale{k + 1}"
                sums[key] = sums.get(key, 0.0) + float(values.sum())
    return {name: total / images.shape[0] for name, total in sums.items()}


def write(out: epath.Path) -> None:
    """runs.csv, table.md and DATASET.png of all runs under `out`."""
    rows = []
    for path in sorted(out.glob("*/*/figures.json")):
        (option, seed), dataset = path.parent.name.rsplit("-", 1), path.parent.parent.name
        about = {"dataset": dataset, "option": option, "seed": int(seed)}
        rows.append(about | read_json(path)["figures"])
    rows.sort(key=lambda row: (row["dataset"], DRAWN.index(row["option"]), row["seed"]))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(out / "runs.csv") as beside, beside.open("w") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| data | option | seeds | " + " | ".join(FIGURES) + " |"]
    lines.append("|---" * (3 + len(FIGURES)) + "|")
    for dataset, option in dict.fromkeys((row["dataset"], row["option"]) for row in rows):
        some = [row for row in rows if (row["dataset"], row["option"]) == (dataset, option)]
        cells = [cell([row[name] for row in some if name in row]) for name in FIGURES]
        lines.append(f"| {dataset} | {option} | {len(some)} | {' | '.join(cells)} |")
    with replacing(out / "table.md") as beside:
        beside.write_text("\n".join(lines) + "\n")
    draw(out, rows)
    print("\n".join(lines))


def draw(out: epath.Path, rows: list[dict[str, Any]]) -> None:
    """DATASET.png: an option has the same colour in each, and the default lies on top."""
    from matplotlib import colormaps

    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        figure, axes = charts(len(BY_SCALE))
        for axis, (prefix, title) in zip(axes, BY_SCALE.items(), strict=True):
            axis.set(title=title, xlabel="scale")
            for i, option in enumerate(DRAWN):
                some = [r for r in rows if (r["dataset"], r["option"]) == (dataset, option)]
                scales = [k for k in range(1, 65) if some and f"{prefix}{k}" in some[0]]
                if len(scales) > 1:
                    line = [mean(row[f"{prefix}{k}"] for row in some) for k in scales]
                    thick = {"linewidth": 3, "zorder": 3} if option == "default" else {}
                    colour = colormaps["tab20"](i)
                    axis.plot(scales, line, label=option, color=colour, marker="o", ms=3.5, **thick)
        save_charts(out / f"{dataset}.png", figure, axes)


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


if __name__ == "__main__":
    cli.run(main, define_flags)
