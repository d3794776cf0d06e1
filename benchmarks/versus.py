"""VAR, raster-scan AR and a DiT at equal training compute; the paper's ablation; sampling times.

    python benchmarks/versus.py --out runs/versus
    python benchmarks/versus.py --study coarse --out runs/coarse
    python benchmarks/versus.py --study ablation --out runs/ablation
    python benchmarks/versus.py --study tries --seeds 1 --out runs/tries
    python benchmarks/versus.py --study speed --out runs/speed

The first trains each model of configs/versus.py at three budgets with three seeds. Each is tuned at
the middle budget and seed 0: three learning rates, of which the least validation loss counts, then
three guidance scales, token noise or none and three values of top-p, of which the least Fréchet
distance does: 11 trials, and 6 of the DiT, which has neither tokens nor top-p. The second does so
with coarser tokens, the third trains the rows of configs/ablation.py at the middle budget, the
fourth what might bring VAR ahead of raster scan. They write points.csv, tuning.csv (trials that
were not chosen), table.md and points.png. The last times samplers with random weights at 32 px,
with 8x8 and 4x4 tokens, and at 256 px, and writes speeds.csv and table.md. Compute is that of
tools/flops.py, of the transformer alone. A stopped command continues.
"""

import csv
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from kept import kept
from ml_collections import ConfigDict
from speed import interleaved

from var_jax.config import Config, from_dict, settings
from var_jax.data.sources import open_source
from var_jax.evaluation.features import extract, load_network
from var_jax.evaluation.image_sets import ImageSet
from var_jax.evaluation.pixel_report import NEAR_COPY, agreement, arrays, fit, nearest_distance
from var_jax.evaluation.quality import figures, held_out_images, open_reference
from var_jax.evaluation.tokenizer import Reconstructions
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.transformer import make_transformer
from var_jax.sampling.autoregressive import Weights
from var_jax.sampling.exports import build, load_models, load_tokenizer
from var_jax.sampling.generate import image_keys, reconstruct_images, sampler_of
from var_jax.schedule import PATCH_NUMS_256
from var_jax.tools import cli
from var_jax.tools.configs import load_config
from var_jax.tools.files import output_path, read_json, replacing
from var_jax.tools.flops import matmul_flops, transformer_flops
from var_jax.tools.images import charts, save_charts
from var_jax.tools.npz import NpzImages, is_whole, save_npz
from var_jax.training.hooks import draw_samples
from var_jax.training.run import train

MODELS = ("var", "raster", "dit")
ROWS = ("raster", "var", "adaln", "top_k", "cfg", "qk_norm", "larger")
TRIES = {  # the config and what is changed of it
    "var": ("var", ""),
    "narrow top-p": ("var", "sampling.top_p=0.95,0.95,0.8,0.3"),
    "token noise": ("var", "train_transformer.token_noise=0.2"),
    "six scales": ("var", "tokenizer.patch_nums=1,2,3,4,6,8"),
    "last scale twice": ("var", "tokenizer.patch_nums=1,2,4,8,8"),
    "last scale twice, token noise": (
        "var",
        "tokenizer.patch_nums=1,2,4,8,8 train_transformer.token_noise=0.2",
    ),
    "raster": ("raster", ""),
    "var, 4x4 tokens, nine scales": (
        "var_4x4",
        "train_transformer.token_noise=0.2 sampling.top_p=0.95,0.95,0.9,0.8,0.5,0.3,0.1,0.1,0.1",
    ),
    "var, 4x4 tokens, four scales": (
        "var_4x4",
        "tokenizer.patch_nums=1,2,3,4",
    ),
    "raster, 4x4 tokens": ("raster_4x4", ""),
}
RATES = (0.5, 1.0, 2.0)  # factors on a config's learning rate that are tried
GUIDANCE = (0.0, 1.0, 2.0)  # scales that are tried
OF_TOKENS = (  # fields that are tried in turn, of models that predict tokens
    ("train_transformer.token_noise=0", "train_transformer.token_noise=0.2"),
    ("sampling.top_p=0.95", "sampling.top_p=0.8", "sampling.top_p=0.6"),
)
SETTING = ("model", "budget", "seed", "learning rate", "token noise", "cfg", "top-p")
FIGURES = ("FD", "KID", "precision", "recall", "class agreement", "near-copies")
OF_TOKENIZER = ("rFD", "near-copies, real")  # of reconstructions: training set, validation set
TERA = 1e12


class Point(NamedTuple):
    """A training, and how it is sampled."""

    model: str  # a row of the table
    spec: str  # of its config
    budget: float  # TFLOPs of training
    seed: int = 0
    rate: float = 1.0  # a factor on the learning rate
    cfg: float | None = None  # None: the config's
    fields: str = ""  # of the config that are changed, NAME=VALUE


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("out", "runs/versus", "Folder of the runs.")
    flags.DEFINE_enum("study", "models", [*STUDIES, "speed"], "What is compared.")
    flags.DEFINE_list("budgets", ["1.8", "3.6", "7.2"], "TFLOPs of training.")
    flags.DEFINE_integer("seeds", 3, "Of each.", 1)
    flags.DEFINE_integer("num", 1000, "Samples that are measured.", 10)
    flags.DEFINE_integer("tokenizer_steps", 1500, "Of 32 images.", 1)
    flags.DEFINE_list("batches", ["1", "64"], "Images at a time that are timed.")


def main(args: flags.FlagValues) -> None:
    """Trains and measures what is missing, and prints the tables."""
    out = output_path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.study == "speed":
        rows = [
            *speeds(small_configs(), args.batches),
            *speeds(small_configs("_4x4"), args.batches),
            *speeds(large_configs(), ["1"]),
        ]
        write_csv(out / "speeds.csv", rows)
        text = speed_table(rows)
    else:
        study = Study(out, args.num, args.tokenizer_steps)
        budgets = [float(budget) for budget in args.budgets]
        points = STUDIES[args.study](study, budgets, args.seeds)
        rows = [study.row(point) for point in points]
        write_csv(out / "points.csv", rows)
        if tuning := not_chosen(rows, [*study.trials.values()]):
            write_csv(out / "tuning.csv", tuning, list(rows[0]))
        floor = study.floor()
        draw(out / "points.png", rows, floor["FD"])
        text = table(rows, floor)
    with replacing(out / "table.md") as beside:
        beside.write_text(text)
    print(text)


def models(study: "Study", budgets: Sequence[float], seeds: int, variant: str = "") -> list[Point]:
    """All models at all budgets, each tuned at the middle one."""
    points, middle = [], budgets[len(budgets) // 2]
    for model in MODELS:
        best = tuned(study, Point(model, f"versus:{model}{variant}", middle))
        several = itertools.product(budgets, range(seeds))
        points += [best._replace(budget=budget, seed=seed) for budget, seed in several]
    return points


def tuned(study: "Study", point: Point) -> Point:
    """The point with the best learning rate, then guidance, then fields."""
    distance = lambda tried: study.row(tried)["FD"]
    best = min((point._replace(rate=rate) for rate in RATES), key=study.loss)
    best = min((best._replace(cfg=cfg) for cfg in GUIDANCE), key=distance)
    for fields in OF_TOKENS if point.model != "dit" else ():
        tried = [best._replace(fields=f"{best.fields} {field}".strip()) for field in fields]
        best = min(tried, key=distance)
    return best


def ablation(study: "Study", budgets: Sequence[float], seeds: int) -> list[Point]:
    """The rows of the ablation at the middle budget."""
    middle = budgets[len(budgets) // 2]
    return [Point(r, f"ablation:{r}", middle, seed) for r in ROWS for seed in range(seeds)]


def tries(study: "Study", budgets: Sequence[float], seeds: int) -> list[Point]:
    """Models with something changed, at the middle budget and with the guidance that was best."""
    middle = budgets[len(budgets) // 2]
    cfg = lambda model: 0.0 if model.startswith("raster") else 2.0
    several = itertools.product(TRIES.items(), range(seeds))
    return [
        Point(name, f"versus:{model}", middle, seed, cfg=cfg(model), fields=fields)
        for (name, (model, fields)), seed in several
    ]


coarse = functools.partial(models, variant="_4x4")
STUDIES = {"models": models, "coarse": coarse, "ablation": ablation, "tries": tries}


def config_of(point: Point) -> ConfigDict:
    """The config of a point: as many steps as its budget allows."""
    config = load_config(point.spec, point.fields.split())
    training = config.train_transformer
    flops = transformer_flops(from_dict(Config, config).transformer) * training.batch_size
    training.steps = max(1, round(point.budget * TERA / flops))
    training.warmup_steps = training.steps // 20
    training.learning_rate *= point.rate
    config.seed = point.seed
    if point.cfg is not None:
        config.sampling.cfg = point.cfg
    return config


def name_of(config: ConfigDict) -> str:
    """What tells a training from the others."""
    c, training = config.transformer, config.train_transformer
    words = [c.kind, f"d{c.depth}", "adaln" * c.adaln, "norm" * c.qk_norm, training.steps]
    words += [f"noise{training.token_noise:g}" * bool(training.token_noise)]
    words += [f"rate{training.learning_rate:.3g}", f"seed{config.seed}"]
    return "-".join(str(word) for word in words if word)


def trained(config: ConfigDict, workdir: epath.Path, about: dict[str, Any]) -> dict[str, Any]:
    """The summary of a training in `workdir`, run if it is not there."""

    def run() -> dict[str, Any]:
        train(from_dict(Config, config), workdir)
        return read_json(workdir / "summary.json")

    return kept(workdir.parent / f"{workdir.name}.json", about, run)  # names have dots


class Study:
    """Trains and measures points in a folder, each once."""

    def __init__(self, out: epath.Path, num: int, tokenizer_steps: int):
        self.out, self.num, self.tokenizers = out, num, {"tokenizer steps": tokenizer_steps}
        self.source = load_config("versus:var").data.source
        self.where = {"split": "validation", "size": 32}
        self.network = load_network("efficientnet")
        self.trials: dict[Point, dict[str, Any]] = {}  # what is known of each point so far

    def row(self, point: Point) -> dict[str, Any]:
        """What is known of a point."""
        config = config_of(point)
        fixed, summary = from_dict(Config, config), self.train(config)
        training, how = config.train_transformer, fixed.sampling.flags(fixed.transformer.kind)
        images, (passes, flops) = training.steps * training.batch_size, cost(fixed)
        found = {
            "model": point.model, "budget": point.budget, "seed": point.seed,
            "learning rate": training.learning_rate, "cfg": fixed.sampling.cfg,
            "token noise": training.token_noise, "top-p": " ".join(map(str, fixed.sampling.top_p)),
            "images": images,
            "TFLOPs": images * transformer_flops(fixed.transformer) / TERA,
            "minutes": summary["minutes, this start"], "validation loss": self.loss(point),
            "passes": passes, "sampling GFLOPs": flops / 1e9,
            **self.reconstructions(config),
        }  # fmt: skip
        name = "-".join(f"{key}{value}" for key, value in how.items())
        path = self.out / "figures" / f"{name_of(config)}-{name}-{self.num}.json"
        measure = functools.partial(self.measure, config, path.with_suffix(".npz"))
        found |= kept(path, settings(fixed) | self.tokenizers, measure)
        cells = {name: shown(x) if type(x) is float else x for name, x in found.items()}
        print(", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
        self.trials[point] = found
        return found

    def loss(self, point: Point) -> float:
        """The last validation loss: in nats a token, of a DiT the squared error of the velocity."""
        config = config_of(point)
        summary = self.train(config)
        loss = next(value for name, value in summary.items() if "validation loss" in name)
        about = {"model": point.model, "budget": point.budget, "seed": point.seed}
        about |= {"learning rate": config.train_transformer.learning_rate}
        about |= {"token noise": config.train_transformer.token_noise, "validation loss": loss}
        self.trials.setdefault(point, about)
        return loss

    def train(self, config: ConfigDict) -> dict[str, Any]:
        """What a training says at its end; sampling settings make no difference to it."""
        about = settings(from_dict(Config, config)) | self.tokenizers
        del about["sampling"]
        config = config.copy_and_resolve_references()
        config.pretrained_tokenizer = str(self.tokenizer(config) / "checkpoint")
        config.train_tokenizer.steps = 0  # it is taken as it is
        return trained(config, self.out / name_of(config), about)

    def tokenizer(self, config: ConfigDict) -> epath.Path:
        """The work directory of the tokenizer that a config has."""
        name = "x".join(map(str, config.tokenizer.patch_nums))
        workdir, config = self.out / f"tokenizer-{name}", config.copy_and_resolve_references()
        config.seed, config.train_transformer.steps = 0, 0
        config.train_tokenizer.steps = self.tokenizers["tokenizer steps"]
        fixed = settings(from_dict(Config, config))
        trained(config, workdir, {key: fixed[key] for key in ("tokenizer", "train_tokenizer")})
        return workdir

    def measure(self, config: ConfigDict, path: epath.Path) -> dict[str, float]:
        """Figures of samples, which are kept in `path`; an equal number of each class."""
        labels = np.resize(np.arange(10, dtype=np.int32), self.num)
        if not is_whole(path):
            loaded = load_models(self.out / name_of(config) / "checkpoint")
            loaded = loaded._replace(sampling=from_dict(Config, config).sampling)
            images = draw_samples(loaded, labels, config.seed + 1)
            save_npz(path, arr_0=images, labels=labels)
        samples = NpzImages(path)
        images = next(samples.batches(self.num))
        agree = agreement(self.classifier, images, labels, "samples", ())
        return self.quality(samples) | {
            "class agreement": agree["class agreement, samples"],
            "near-copies": self.near_copies(images, self.tokenizer(config)),
        }

    def quality(self, images: ImageSet) -> dict[str, float]:
        """Distances between images and the validation set."""
        folder = self.out / "features"
        reference = open_reference(self.source, self.network, folder, **self.where)
        assert reference is not None
        found = figures(self.network, extract(self.network, images, folder), reference)
        return dict(zip(FIGURES, found.values(), strict=False))

    def reconstructions(self, config: ConfigDict) -> dict[str, float]:
        """What a tokenizer does to images of the training set, and of the validation set."""
        workdir = self.tokenizer(config)

        def measure() -> dict[str, float]:
            images = held_out_images(self.source, self.num, 32, "train")
            tokenizer = load_tokenizer(workdir / "checkpoint")
            again = reconstruct_images(tokenizer, self.validation[0])
            found = (
                self.quality(Reconstructions(tokenizer, images))["FD"],
                self.near_copies(again, workdir),
            )
            return dict(zip(OF_TOKENIZER, found, strict=True))

        path = self.out / "figures" / f"{workdir.name}-reconstructions-{self.num}.json"
        return kept(path, self.tokenizers, measure)

    def floor(self) -> dict[str, float]:
        """Figures of as many images of the training set; class agreement of the validation set."""
        held_out = held_out_images(self.source, self.num, 32, "train")
        agree = agreement(self.classifier, *self.validation, "validation", ())
        return self.quality(held_out) | {"class agreement": agree["class agreement, validation"]}

    @functools.cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the validation set, as many as are sampled."""
        images, labels = arrays(open_source(self.source, "validation", 32))
        chosen = np.linspace(0, len(images) - 1, self.num).astype(int)
        return images[chosen], labels[chosen]

    @functools.cached_property
    def classifier(self) -> Any:
        """A classifier of pixels."""
        return fit(*arrays(open_source(self.source, "train", 32), most=2**25))

    @functools.cache  # noqa: B019 (one study a process)
    def training_images(self, tokenizer: str) -> np.ndarray:
        """The training set as a tokenizer reconstructs it, so that a copy is near."""
        images, _ = arrays(open_source(self.source, "train", 32), most=2**28)
        return reconstruct_images(load_tokenizer(epath.Path(tokenizer) / "checkpoint"), images)

    def near_copies(self, images: np.ndarray, tokenizer: epath.Path) -> float:
        """The share of images that are near one of the training set."""
        parts = np.array_split(self.training_images(str(tokenizer)), 6)
        near = np.min([nearest_distance(images, part) for part in parts], axis=0)
        return float((near < NEAR_COPY).mean())


def write_csv(
    path: epath.Path, rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None
) -> None:
    """All rows; columns have the names of the first, or these."""
    with replacing(path) as beside, beside.open("w") as file:
        writer = csv.DictWriter(file, names or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def not_chosen(
    rows: Sequence[dict[str, Any]], trials: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Trials whose setting no row has, each once, however a point spells it.

    Of some only the training is known; they go where a row or another trial has that training.
    """
    same = lambda trial, row: all(row.get(key) == trial[key] for key in SETTING if key in trial)
    found: list[dict[str, Any]] = []
    for trial in sorted(trials, key=len, reverse=True):  # those that were sampled first
        if not any(same(trial, row) for row in [*rows, *found]):
            found.append(trial)
    return sorted(found, key=trials.index)


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Rows that differ in the seed alone."""
    key = lambda row: (row["model"], row["budget"])
    return {group: [row for row in rows if key(row) == group] for group in map(key, rows)}


def table(rows: Sequence[dict[str, Any]], floor: dict[str, float]) -> str:
    """Means of the seeds with their standard deviations, in Markdown."""
    tuned = ("learning rate", "cfg", "token noise", "top-p")
    names = (*FIGURES, *OF_TOKENIZER)
    head = ("model", "TFLOPs", "images", *tuned, "passes", "GFLOPs an image", *names)
    real = "real images", *("",) * 8, *(shown(floor[n]) if n in floor else "" for n in names)
    lines = [head, ("---",) * len(head), real]
    for (model, budget), group in grouped(rows).items():
        first = group[0]
        how = [first[name] for name in tuned]
        how = [shown(value) if isinstance(value, float) else value for value in how]
        how += [str(first["passes"]), shown(first["sampling GFLOPs"])]
        cells = [spread([row[name] for row in group]) for name in names]
        lines.append((model, f"{budget:g}", f"{first['images']:,}", *how, *cells))
    hours = sum({row["minutes"] for row in rows}) / 60
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\n{hours:.1f} hours of training.\n"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return shown(statistics.mean(values)) + deviation


def shown(value: float) -> str:
    """A figure in a table."""
    return f"{value:.3g}"


def draw(path: epath.Path, rows: Sequence[dict[str, Any]], floor: float) -> None:
    """A chart for each figure, over compute, or of an ablation over its rows.

    Lines join the means of the seeds, dots are the seeds; `floor` is the distance of real images.
    """
    one_budget = len({row["budget"] for row in rows}) == 1
    names = [name for name in FIGURES if name != "near-copies"]  # 0 of most: it is in the table
    lines: dict[str, list[list[dict[str, Any]]]] = {}
    for (model, _), group in grouped(rows).items():
        lines.setdefault("" if one_budget else model, []).append(group)
    figure, axes = charts(len(names))
    for axis, name in zip(axes, names, strict=True):
        for label, groups in lines.items():
            at = [group[0]["model" if one_budget else "budget"] for group in groups]
            means = [statistics.mean(row[name] for row in group) for group in groups]
            (line,) = axis.plot(at, means, label=label, linewidth=1.6)
            seeds = [(x, row[name]) for x, group in zip(at, groups, strict=True) for row in group]
            axis.plot(*zip(*seeds, strict=True), "o", color=line.get_color(), ms=3.5, alpha=0.6)
        axis.set(title=name, xlabel="" if one_budget else "TFLOPs of training")
    axes[0].axhline(floor, color="0.6", linewidth=1.2)
    where = dict(xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(0, 3))
    axes[0].annotate("real images", (0.02, floor), **where, color="0.4", fontsize=8)
    save_charts(path, figure, axes)


def small_configs(variant: str = "") -> dict[str, ConfigDict]:
    """The models of the comparison, with guidance; raster scan also without, as it was best."""
    found = {model: load_config(f"versus:{model}{variant}") for model in MODELS}
    plain = load_config(f"versus:raster{variant}", ["sampling.cfg=0"])
    return found | {"raster, no guidance": plain}


def large_configs() -> dict[str, ConfigDict]:
    """At 256 px: the paper's schedule and 16x16 tokens, eight layers, a small tokenizer."""
    found = {}
    for model, config in small_configs().items():
        sides = (16,) if model.startswith("raster") else PATCH_NUMS_256
        config.data.size = 256
        config.tokenizer.update(
            patch_nums=sides, patch_size=1, channel_mults=(1, 1, 1, 1, 1), num_res_blocks=1,
            latent_dim=32, vocab_size=4096,
        )  # fmt: skip
        config.transformer.update(depth=8, width=512, num_heads=8)
        found[model] = config
    return found


def speeds(configs: dict[str, ConfigDict], batches: Sequence[str]) -> list[dict[str, Any]]:
    """What sampling costs with random weights: a row for each model, batch and round."""
    rows = []
    for batch in map(int, batches):
        tasks = [sampling(from_dict(Config, config), batch) for config in configs.values()]
        for compiling in tasks:
            compiling()
        times = interleaved(tasks, 5)
        for (name, config), taken in zip(configs.items(), times, strict=True):
            fixed = from_dict(Config, config)
            side, (passes, flops) = fixed.tokenizer.patch_nums[-1], cost(fixed)
            about = {"model": name, "pixels": fixed.data.size, "tokens": f"{side}x{side}"}
            about |= {"passes": passes, "GFLOPs an image": flops / 1e9, "batch": batch}
            rows += [about | {"round": i, "s": seconds} for i, seconds in enumerate(taken)]
    return rows


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians of the rounds, and of the ratios to VAR's time in the same round, in Markdown."""
    about = ("model", "pixels", "tokens", "passes", "GFLOPs an image", "batch")
    head = (*about, "s", "times VAR")
    lines = [head, ("---",) * len(head)]
    several: dict[tuple, list[float]] = {}
    for row in rows:
        several.setdefault(tuple(row[name] for name in about), []).append(row["s"])
    for key, taken in several.items():
        if key[0] == "var":  # the first of its group
            var = taken
        ratio = statistics.median(b / a for a, b in zip(var, taken, strict=True))
        cells = [shown(cell) if isinstance(cell, float) else str(cell) for cell in key]
        lines.append((*cells, shown(statistics.median(taken)), f"{ratio:.2f}"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sampling(config: Config, batch: int) -> Callable[[], object]:
    """Samples with random weights, and waits for the images."""
    make = lambda: Weights(
        make_tokenizer(config.tokenizer, rngs=nnx.Rngs(0)),
        make_transformer(config.transformer, rngs=nnx.Rngs(1)),
    )
    weights, sampler = jax.jit(make)(), sampler_of(config.transformer.kind, config.sampling)
    labels, keys = np.zeros(batch, np.int32), image_keys(0, np.arange(batch, dtype=np.int32))
    return lambda: jax.block_until_ready(sampler(weights, labels, keys))


def cost(config: Config) -> tuple[int, int]:
    """What sampling an image takes: passes of the transformer, operations of matrix products."""
    model, settings = config.transformer, config.sampling
    weights = Weights(build(config.tokenizer), build(model))
    labels, keys = np.zeros(1, np.int32), image_keys(0, np.zeros(1, np.int32))
    flops = matmul_flops(sampler_of(model.kind, settings), weights, labels, keys)
    evaluations = settings.steps * (2 if settings.solver == "heun" else 1)
    return evaluations if model.kind == "dit" else len(model.blocks), flops


if __name__ == "__main__":
    cli.run(main, define_flags)
