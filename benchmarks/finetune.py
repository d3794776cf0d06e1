"""Fine-tuning beside training from scratch, at equal steps: Noto emoji to Twemoji.

    npm pack emoji-datasource-twitter@16.0.0
    python -m benchmarks.finetune --package emoji-datasource-twitter-16.0.0.tgz \
        --checkpoint runs/emoji/checkpoint

Twemoji are drawn in another style, and their classes here are subgroups of Unicode ("face-smiling",
"animal-bird"), of which the checkpoint knows none. Each start gets its best of the same learning
rates. Writes finetune.csv (validation loss by step) and finetune.png.
"""

import csv
import dataclasses
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from var_jax.config import Config, from_dict
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.tools.images import curves
from var_jax.tools.logs import read_metrics
from var_jax.training.run import train

MIN_IMAGES, SIZE = 12, 32


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("package", None, "The npm tarball.", required=True)
    flags.DEFINE_string("checkpoint", None, "Of configs/emoji.py.", required=True)
    flags.DEFINE_integer("steps", 120, "Of each run.")
    flags.DEFINE_list("rates", ["4e-3", "1.6e-2"], "Learning rates for 256 images.")
    flags.DEFINE_string("out", "runs/finetune", "Work directories.")
    flags.DEFINE_string("figures", "benchmarks/emoji", "Where the curve and its numbers go.")


def main(args: flags.FlagValues) -> None:
    """Trains each start at each rate and writes the best curve of each."""
    out, best = Path(args.out), {}
    out.mkdir(parents=True, exist_ok=True)
    source = out / "twemoji.npz"
    if not source.exists():
        write_source(args.package, source)
    for start in ("fine-tuned", "from scratch"):
        for rate in map(float, args.rates):
            workdir = epath.Path(out / f"{start.replace(' ', '_')}-{rate}")
            config = from_dict(Config, load_config(f"finetune:{args.checkpoint}"))
            training = dataclasses.replace(
                config.train_transformer, steps=args.steps, batch_size=32, learning_rate=rate,
                warmup_steps=10,
            )  # fmt: skip
            config = dataclasses.replace(
                config, train_transformer=training,
                every=dataclasses.replace(config.every, evaluate=15, sample=0),
                data=dataclasses.replace(config.data, source=str(source), flip=True),
                init_from=config.init_from if start == "fine-tuned" else "",
            )  # fmt: skip
            train(config, workdir)
            records = [r for r in read_metrics(workdir) if "val_loss" in r]
            curve = [r["step"] for r in records], [r["val_loss"] for r in records]
            print(f"{start}, rate {rate}: validation loss {curve[1][-1]:.3f}")
            if start not in best or curve[1][-1] < best[start][1][-1]:
                best[start] = curve
    curves(Path(args.figures) / "finetune.png", {"validation loss (nats a token)": best})
    with (Path(args.figures) / "finetune.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["start", "step", "validation_loss"])
        writer.writerows(
            (start, step, f"{loss:.4f}")
            for start, (steps, losses) in best.items()
            for step, loss in zip(steps, losses, strict=True)
        )


def write_source(package: str, path: Path) -> None:
    """The images of the larger subgroups on white, as an npz."""
    with tarfile.open(package) as tar:
        read = lambda name: tar.extractfile(f"package/{name}").read()  # type: ignore[union-attr]
        entries = [e for e in json.loads(read("emoji.json")) if e["has_img_twitter"]]
        counts = Counter(entry["subcategory"] for entry in entries)
        names = sorted(name for name, count in counts.items() if count >= MIN_IMAGES)
        entries = [entry for entry in entries if entry["subcategory"] in names]
        images = [read(f"img/twitter/64/{entry['image']}") for entry in entries]
    np.savez(
        path,
        arr_0=np.stack([on_white(image) for image in images]),
        labels=np.array([names.index(entry["subcategory"]) for entry in entries]),
        class_names=np.array(names),
    )


def on_white(data: bytes) -> np.ndarray:
    """An image of `SIZE` pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


if __name__ == "__main__":
    cli.run(main, define_flags)
