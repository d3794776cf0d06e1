"""Trains a tokenizer, then a transformer on its tokens.

    python -m var_jax.train --config configs/emoji.py [--workdir DIR] [--config.a.b=v]

The same command goes on where a stopped run was. It leaves in the work directory: checkpoint/ (what
`var_jax.sample` reads), reconstructions.png, samples.png, curves.png, summary.json, metrics.jsonl
and speed.jsonl, tensorboard/; and to go on from: config.json, tokenizer/, transformer/.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jaxtyping import Int32, UInt8
from ml_collections import config_flags

from var_jax import BadInput
from var_jax.config import Config, StageConfig, from_dict
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches
from var_jax.data.records import read_json, read_manifest
from var_jax.data.sources import Source, open_source
from var_jax.data.token_cache import KIND, TokenCache, encode, open_tokens
from var_jax.data.write_tokens import fingerprint
from var_jax.evaluation.pixel_report import report
from var_jax.models.load import Models, describe, load_tokenizer, rounded, save_models
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.sampling.generate import coarse_to_fine, generate
from var_jax.sharding import hosts
from var_jax.sharding.mesh import (
    check_batch,
    check_hosts,
    check_model,
    make_mesh,
    put_whole,
    to_host,
)
from var_jax.sharding.ops import round_up
from var_jax.tools import cli
from var_jax.tools.files import held, replacing
from var_jax.tools.images import curves, grid, labelled_rows, save_png
from var_jax.tools.logs import Metrics, read_metrics
from var_jax.training import loop
from var_jax.training.autoregressive import transformer_stage
from var_jax.training.state import TrainState
from var_jax.training.tokenizer import reconstruct, tokenizer_stage

CONFIG = config_flags.DEFINE_config_file("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Default: runs/NAME for configs/NAME.py.")
PROFILE = flags.DEFINE_integer("profile", 0, "Trace so many steps for TensorBoard, from the tenth.")
flags.adopt_module_key_flags(hosts)
ROWS, SAMPLES_A_CLASS = 16, 10  # of samples.png


def main(argv: list[str]) -> None:
    """Runs both stages and writes what they leave."""
    started = time.monotonic()
    cli.no_arguments(argv)
    if CONFIG.value is None:
        raise BadInput("--config is missing; expected a file like configs/emoji.py.")
    config = from_dict(Config, CONFIG.value)
    hosts.join()
    run = Run(config, epath.Path(WORKDIR.value or default_workdir()))
    with jax.set_mesh(run.mesh):
        tokenizer = run.tokenizer()
        parts: dict[str, Any] = {"tokenizer": tokenizer}
        if config.train_transformer.steps:
            parts["transformer"] = run.transformer(tokenizer)
        save_models(run.workdir / "checkpoint", parts, run.train.class_names, config)
        summary = last_validation(run.workdir)
        if "transformer" in parts:
            stored = rounded(parts, config.export_dtype)
            models = Models(**stored, class_names=run.train.class_names, sampling=config.sampling)
            fresh = functools.partial(draw, models, seed=config.seed + 1)
            again = functools.partial(reconstruct, models.tokenizer, mesh=run.mesh)
            summary |= report(run.train, run.validation, fresh, again)  # of what is in checkpoint/
            picture = sample_rows(models, config.seed)
            if jax.process_index() == 0:
                save_png(run.workdir / "samples.png", picture)
    if jax.process_index() > 0:
        return
    plot(run.workdir)
    summary["minutes, this start"] = (time.monotonic() - started) / 60
    with replacing(run.workdir / "summary.json") as beside:
        beside.write_text(json.dumps(summary, indent=2) + "\n")
    print("\n".join(f"{name:32s} {value:.4g}" for name, value in summary.items()))
    print(f"pictures and checkpoint are in {run.workdir}")


class Run:
    """One experiment: its data, mesh and work directory, checked before anything is computed."""

    def __init__(self, config: Config, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh))
        check_hosts(self.mesh)
        c = config.transformer
        check_model(c.width, c.num_heads, c.vocab_size, self.mesh)
        check_stage("train_tokenizer", config.train_tokenizer, self.mesh)
        check_stage("train_transformer", config.train_transformer, self.mesh)
        check_tokenizer(config)
        data = config.data
        self.train, self.validation = (
            open_source(data.source, split, data.size, data.resize)
            for split in ("train", "validation")
        )
        classes = len(self.train.class_names)
        if config.train_transformer.steps and classes != config.transformer.num_classes:
            raise BadInput(
                f"transformer.num_classes={config.transformer.num_classes}, but"
                f" {config.data.source} has {classes} classes."
            )
        self.pretrained: Tokenizer | None = None
        self.stored: tuple[TokenCache, TokenCache] | None = None
        if config.pretrained_tokenizer:
            with jax.set_mesh(self.mesh):
                self.pretrained = load_tokenizer(config.pretrained_tokenizer, self.mesh)
                if data.tokens:
                    self.stored = self.stored_tokens(self.pretrained)
        claim(workdir, config, fingerprint(self.pretrained) if self.pretrained else "")
        self.metrics = Metrics(workdir)
        self.augmentation = {"flip": config.data.flip, "shift": config.data.shift}

    def batches(self, source: Source, batch_size: int, **augmentation):
        """An endless stream of this process's share of the batches."""
        return batches(
            source,
            batch_size=batch_size,
            seed=self.config.seed,
            augment=augment_items(**augmentation) if augmentation else None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.data.workers,
        )

    def tokenizer(self) -> Tokenizer:
        """Stage 1, or what another run or `var_jax.convert` left."""
        if self.pretrained:
            return self.pretrained
        config = self.config.train_tokenizer
        stage = tokenizer_stage(self.config.tokenizer, config)

        def look(step: int, state: TrainState) -> dict[str, float]:
            picture = reconstructions(state.best, self.validation, self.mesh)
            if jax.process_index() == 0:
                save_png(self.workdir / "reconstructions.png", picture)
            self.metrics.image(stage.name, step, "reconstructions", picture)
            return loop.evaluate(stage, state, self.validation, config.batch_size, mesh=self.mesh)

        state = loop.run(
            stage,
            self.batches(self.train, config.batch_size, **self.augmentation),
            mesh=self.mesh,
            seed=self.config.seed,
            directory=self.workdir / "tokenizer",
            metrics=self.metrics,
            look=look,
            profile=PROFILE.value,
        )
        return state.best

    def transformer(self, tokenizer: Tokenizer) -> Transformer:
        """Stage 2, on cached tokens or on pixels."""
        config = self.config.train_transformer
        stage = transformer_stage(self.config.transformer, config)
        frozen = {"tokenizer": tokenizer}
        source, validation, augmentation = self.train, self.validation, self.augmentation
        if self.stored:
            source, validation = self.stored
            augmentation = {}

        def look(step: int, state: TrainState) -> dict[str, float]:
            models = Models(tokenizer, state.best, self.train.class_names, self.config.sampling)
            picture = sample_rows(models, self.config.seed)
            if jax.process_index() == 0:
                save_png(self.workdir / "samples.png", picture)
            self.metrics.image(stage.name, step, "samples", picture)
            return loop.evaluate(
                stage, state, validation, config.batch_size, mesh=self.mesh, constants=frozen
            )

        state = loop.run(
            stage,
            self.batches(source, config.batch_size, **augmentation),
            mesh=self.mesh,
            seed=self.config.seed,
            directory=self.workdir / "transformer",
            metrics=self.metrics,
            constants=frozen,
            look=look,
            profile=PROFILE.value,
        )
        return state.best

    def stored_tokens(self, tokenizer: Tokenizer) -> tuple[TokenCache, TokenCache]:
        """The token cache on disk, both splits. Raises: BadInput if it does not fit this run."""
        data, schedule = self.config.data, self.config.tokenizer.patch_nums
        read_manifest(epath.Path(data.tokens), KIND)  # ahead of a fingerprint, which takes long
        ours = fingerprint(tokenizer)
        how = {name: getattr(data, name) for name in ("size", "resize", "flip", "shift")}
        return (
            open_tokens(data.tokens, "train", ours, schedule, self.train, **how),
            open_tokens(data.tokens, "validation", ours, schedule, self.validation, **how),
        )


def check_stage(name: str, stage: StageConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises BadInput if a stage with steps cannot split its batches over the mesh."""
    if stage.steps:
        check_batch(f"{name}.batch_size", stage.batch_size, mesh)
        parts = f"{name}.batch_size / {name}.accumulate"
        check_batch(parts, stage.batch_size // stage.accumulate, mesh)


def check_tokenizer(config: Config) -> None:
    """Raises BadInput if there would be no trained tokenizer, or another than the config's."""
    if config.pretrained_tokenizer:
        _, _, parts = describe(config.pretrained_tokenizer)
        wanted, found = map(dataclasses.asdict, (config.tokenizer, parts["tokenizer"].config))
        for name in wanted:
            if found[name] != wanted[name]:
                raise BadInput(
                    f"{config.pretrained_tokenizer} holds a tokenizer with {name}={found[name]},"
                    f" but config.tokenizer.{name} is {wanted[name]}; it goes with the config that"
                    " trained it (emoji with configs/emoji.py:large)."
                )
        return
    if not config.train_tokenizer.steps:
        raise BadInput(
            "train_tokenizer.steps=0 leaves the tokenizer untrained; name a checkpoint that holds"
            " one as --config.pretrained_tokenizer=DIR."
        )
    if config.data.tokens:
        raise BadInput(
            f"data.tokens={config.data.tokens} holds the codes of a tokenizer; name its checkpoint"
            " as --config.pretrained_tokenizer=DIR."
        )


def default_workdir() -> str:
    """runs/NAME for configs/NAME.py; a suffix such as :large is part of the name."""
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return str(Path("runs") / "-".join(filter(None, (Path(path).stem, variant))))


def claim(workdir: epath.Path, config: Config, tokenizer: str) -> None:
    """Makes `workdir` this config's, and a pretrained tokenizer's of this fingerprint.

    The mesh, the number of worker processes and how samples are drawn may differ.

    Raises: BadInput if it is another's, or another process is at work in it.
    """
    ours = jax.process_index() > 0 or held(workdir / ".lock")
    if not process_allgather(np.asarray(ours)).all():
        raise BadInput(
            f"another run is at work in {workdir}; name another --workdir (or, if its machine is"
            " gone, remove .lock there)."
        )
    path, wanted = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    about = wanted | {"fingerprint": tokenizer}
    if jax.process_index() == 0 and not path.exists():
        with replacing(path) as beside:
            beside.write_text(json.dumps(about, indent=2) + "\n")
    sync_global_devices("work directory claimed")
    if path.exists():
        found = read_json(path)
        if found.pop("fingerprint", tokenizer) != tokenizer:
            raise BadInput(
                f"{workdir} belongs to a run with other weights in"
                f" {config.pretrained_tokenizer}; name another --workdir."
            )
        # A field that is newer than the run has its default.
        try:
            found = json.loads(json.dumps(dataclasses.asdict(from_dict(Config, found))))
        except BadInput as error:
            raise BadInput(f"{path} is of another version: {error}") from None
        found["data"]["workers"] = wanted["data"]["workers"]
        for section in wanted:
            if section not in ("mesh", "sampling") and found[section] != wanted[section]:
                raise BadInput(
                    f"{workdir} belongs to a run whose config.{difference(section, found, wanted)};"
                    " name another --workdir."
                )


def difference(section: str, found: dict, wanted: dict) -> str:
    """The first field of a section that differs, as text."""
    ours, theirs = wanted[section], found.get(section)
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return f"{section} is {theirs}, not {ours}"
    name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
    return f"{section}.{name} is {theirs.get(name)}, not {ours.get(name)}"


def reconstructions(
    tokenizer: Tokenizer, source: Source, mesh: jax.sharding.Mesh, count: int = 12
) -> UInt8[np.ndarray, "H W 3"]:
    """A row a picture: original, reconstruction, and the image after each scale."""
    rows = np.linspace(0, len(source) - 1, count).astype(int)
    originals = np.stack([source[int(i)]["image"] for i in rows])
    padded = np.resize(originals, (round_up(count), *originals.shape[1:]))
    images = put_whole({"image": padded}, mesh)["image"]
    steps = coarse_to_fine(tokenizer, to_host(encode(tokenizer, images))[:count])
    strip = np.concatenate([originals[:, None], steps[:, -1:], steps], axis=1)
    scale = max(1, 64 // originals.shape[1])
    return grid(strip.reshape(-1, *originals.shape[1:]), columns=strip.shape[1], scale=scale)


def sample_rows(models: Models, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """A row of samples a class, its name beside it; of many classes the first."""
    names = models.class_names[:ROWS]
    labels = np.repeat(np.arange(len(names), dtype=np.int32), SAMPLES_A_CLASS)
    images = draw(models, labels, seed)
    rows = images.reshape(len(names), SAMPLES_A_CLASS, *images.shape[1:])
    return labelled_rows(dict(zip(names, rows, strict=True)), max(1, 64 // images.shape[1]))


def draw(
    models: Models, labels: Int32[np.ndarray, " N"], seed: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """Samples of these classes, as `sample` draws them from the checkpoint."""
    made = generate(
        models.transformer, models.tokenizer, labels, batch_size=64, seed=seed,
        **models.sampling.arguments,
    )  # fmt: skip
    return np.concatenate([images for images, _ in made])


def last_validation(workdir: epath.Path) -> dict[str, float]:
    """The newest validation figures of both stages."""
    shown = {"val_psnr": "validation PSNR (dB)", "val_loss": "validation loss (nats a token)"}
    found = {}
    for record in read_metrics(workdir):
        found.update({shown[name]: record[name] for name in shown.keys() & record.keys()})
    return found


def plot(workdir: epath.Path) -> None:
    """curves.png from metrics.jsonl."""
    records = read_metrics(workdir)

    def line(stage: str, name: str):
        points = [(r["step"], r[name]) for r in records if r["stage"] == stage and name in r]
        return tuple(zip(*points, strict=True)) if points else ((), ())

    both = lambda stage, name: {
        "training": line(stage, name), "validation": line(stage, f"val_{name}")
    }  # fmt: skip
    by_scale = {name for record in records for name in record if name.startswith("loss_")}
    by_scale = sorted(by_scale, key=lambda name: (len(name) if "scale" in name else 99, name))
    panels = {
        "tokenizer: PSNR (dB)": both("tokenizer", "psnr"),
        "tokenizer: perplexity of codes": {"": line("tokenizer", "codebook_perplexity")},
        "transformer: loss (nats a token)": both("transformer", "loss"),
        "transformer: accuracy": both("transformer", "accuracy"),
        "transformer: loss by scale": {
            n.removeprefix("loss_"): line("transformer", n) for n in by_scale
        },
        "learning rate": {s: line(s, "learning_rate") for s in ("tokenizer", "transformer")},
    }
    drawn = {title: lines for title, lines in panels.items() if any(x for x, _ in lines.values())}
    if drawn:  # a stage that did not run has no panels
        curves(workdir / "curves.png", drawn)


if __name__ == "__main__":
    cli.run(main)
