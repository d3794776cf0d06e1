r"""Quality and time of each way of decoding, on one checkpoint.

    python benchmarks/decoding.py --checkpoint emoji --source emoji --out /tmp/decoding/emoji
    python benchmarks/decoding.py --checkpoint runs/fashion/checkpoint --num 1000 \
        --source idx:/usr/share/datasets/fashion-mnist --split validation --out /tmp/decoding/idx

Prints a table: the Fréchet distance of the features to the split; how often samples are taken for
their class by a classifier on pixels, beside images of the validation set; the time of sampling a
batch, compiling apart, over that of the first row: medians of batches in turn. With --refiner
collaborative decoding joins, and the refiner alone. Samples and figures of a row lie in OUT; a
stopped command continues.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from kept import kept
from speed import interleaved

import var_jax
from var_jax.data.sources import open_source
from var_jax.evaluation.features import Network, extract, load_network
from var_jax.evaluation.image_sets import open_images
from var_jax.evaluation.pixel_report import arrays, features, fit
from var_jax.evaluation.quality import Reference, distance, open_reference
from var_jax.tools import cli
from var_jax.tools.files import output_folder
from var_jax.tools.npz import save_npz

SETTINGS = ("checkpoint", "refiner", "source", "split", "num", "batch_size")


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("checkpoint", None, "A folder, or a name.", required=True)
    flags.DEFINE_string("refiner", None, "A smaller model of the same tokenizer.")
    flags.DEFINE_string("source", None, "The data that it was trained on.", required=True)
    flags.DEFINE_string("split", "train", "Of the distance.")
    flags.DEFINE_string("features", "efficientnet", "As of var_jax.evaluate.")
    flags.DEFINE_integer("num", 2000, "Samples of each row.", 64)
    flags.DEFINE_integer("batch_size", 64, "Images at a time.", 1)
    flags.DEFINE_string("only", "", "Only rows whose name holds this.")
    flags.DEFINE_string("out", "decoding", "Folder of the rows.")


def main(args: flags.FlagValues) -> None:
    """Samples what is missing and prints a row for each way of decoding."""
    out, model = output_folder(args.out), var_jax.load(args.checkpoint)
    size, network = model.image_size, load_network(args.features)
    reference = open_reference(args.source, network, out / "features", args.split, size)
    assert reference is not None
    train, validation = (
        arrays(open_source(args.source, split, size, resize=1.0))
        for split in ("train", "validation")
    )
    classifier = fit(*train)
    agreement = lambda images, labels: np.mean(classifier.predict(features(images)) == labels)
    about = {name: args[name].value for name in SETTINGS} | {"features": network.fingerprint}
    chosen = {n: row for n, row in rows(model, args.refiner).items() if args.only in n}
    found = {}
    for name, settings in chosen.items():
        folder = out / name.replace(" ", "_").replace("/", "_")
        given = args, model, settings, folder, network, reference, agreement
        found[name] = kept(folder / "figures.json", about, functools.partial(measured, *given))
    print(f"| {args.num} samples of {args.checkpoint} | FD | class agreement | time |")
    print(f"|---|---|---|---|\n| validation set | | {agreement(*validation):.1%} | |")
    times = interleaved([functools.partial(draw, args, model, row) for row in chosen.values()], 5)
    for (name, row), taken in zip(found.items(), times, strict=True):
        ratio = statistics.median(b / a for a, b in zip(times[0], taken, strict=True))
        print(f"| {name} | {row['fd']:.1f} | {row['agreement']:.1%} | {ratio:.2f} |")
    print(f"A batch of the first row takes {statistics.median(times[0]):.2f} s.")


def measured(
    args: flags.FlagValues,
    model: var_jax.Model,
    settings: dict[str, Any],
    folder: epath.Path,
    network: Network,
    reference: Reference,
    agreement: Callable[[np.ndarray, np.ndarray], float],
) -> dict[str, float]:
    """The figures of a row, whose samples are drawn into `folder`."""
    labels = np.resize(np.arange(len(model.class_names), dtype=np.int32), args.num)
    images = draw(args, model, settings, labels)
    save_npz(folder / "samples.npz", arr_0=images, labels=labels)
    found = extract(network, open_images(str(folder / "samples.npz")), folder, 64)
    return {
        "fd": float(distance(found, reference)),
        "agreement": float(agreement(images, labels)),
    }


def rows(model: var_jax.Model, refiner: str | None) -> dict[str, dict[str, Any]]:
    """The settings of each row: those of the checkpoint, where it does not say otherwise."""
    K, codes = len(model.patch_nums), model.models.tokenizer.config.vocab_size
    cfg, half = model.settings().cfg or 1.5, K // 2
    found: dict[str, dict[str, Any]] = {
        "as the checkpoint says": {},
        "temperature 0.9": {"temperature": 0.9},
        "temperature 1.1": {"temperature": 1.1},
        "top-k on the finer half": {"top_k": [0] * half + [codes // 8] * (K - half)},
        **{
            f"cfg {cfg}, {guidance}": {"cfg": cfg, "guidance": guidance}
            for guidance in ("ramp", "constant", f"interval={K // 3 + 1}-{K - K // 3}")
        },
        **{f"ssg={beta}": {"guidance": f"ssg={beta}"} for beta in (0.1, 0.3)},
    }
    if refiner is not None:
        small = model.load_refiner(refiner)
        for drafts in (half, 3 * K // 4):
            found[f"CoDe, {drafts} of {K} drafted"] = {"refiner": small, "draft_scales": drafts}
        found["the refiner alone"] = {"model": small}
    return found


def draw(
    args: flags.FlagValues,
    model: var_jax.Model,
    settings: dict[str, Any],
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Samples of these labels, or a batch of the first class."""
    settings = dict(settings)
    model = settings.pop("model", model)
    labels = np.zeros(args.batch_size, np.int32) if labels is None else labels
    return np.asarray(model.sample(labels, batch_size=args.batch_size, **settings))


if __name__ == "__main__":
    cli.run(main, define_flags)
