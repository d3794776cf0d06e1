"""An experiment: its data, mesh and work directory, both trainings, and what they leave."""

import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from var_jax import BadInput, Failure
from var_jax.checkpoints.export import check_replaceable, load_fingerprint, weights_digest
from var_jax.config import Config
from var_jax.data.augmentation import augment_items
from var_jax.data.inventory import summarize
from var_jax.data.pipeline import batches
from var_jax.data.records import read_manifest
from var_jax.data.sources import Source, open_source
from var_jax.data.token_cache import KIND, TokenCache, open_tokens
from var_jax.evaluation import pixel_report
from var_jax.models.backbone import Backbone
from var_jax.models.other_schedule import tokenizer_at
from var_jax.models.tokenizer import Tokenizer
from var_jax.sampling.exports import (
    Models,
    abstract_models,
    as_exported,
    load_models,
    load_tokenizer,
    save_models,
)
from var_jax.sampling.generate import reconstruct_images
from var_jax.schedule import num_tokens
from var_jax.sharding.mesh import check_hosts, check_model, make_mesh, of_first
from var_jax.sharding.rows import replicate
from var_jax.tools.files import replacing
from var_jax.tools.images import curves, going_on_without, save_png
from var_jax.tools.logs import Metrics
from var_jax.tools.paths import user_path
from var_jax.tools.plugins import describe, find_function
from var_jax.training import hooks, loop
from var_jax.training.checks import (
    check_attention,
    check_batches,
    check_hosts_agree,
    check_rounding,
    check_start,
    check_tokenizer,
    with_classes,
)
from var_jax.training.codebook import init_stats
from var_jax.training.init_from import transformer_from
from var_jax.training.loss_networks import loss_networks
from var_jax.training.state import TransformerState, start_from
from var_jax.training.tasks import task_of
from var_jax.training.tokenizer import TokenizerState
from var_jax.training.workdir import TRAININGS, count_steps, occupy

UNITS = {"dit": "squared error of the velocity"}  # of the loss of a kind of transformer
REPORT_ARGUMENTS = 4  # training and validation set, and functions that draw and reconstruct


def train(config: Config, workdir: epath.Path, *, profile: int = 0) -> dict[str, Any]:
    """Runs both trainings in `workdir` and returns the figures of summary.json.

    `profile` many steps of each are traced. Raises: BadInput, before anything is computed, if the
    config does not fit its data, the devices or the work directory.
    """
    started = time.monotonic()
    run = Run(config, workdir, profile)
    unit = UNITS.get(config.transformer.kind, "nats a token")
    with jax.set_mesh(run.mesh):
        tokenizer = run.tokenizer()
        parts: dict[str, Any] = {"tokenizer": tokenizer}
        if config.train_transformer.steps:
            parts["transformer"] = run.transformer(tokenizer)
        run.save(parts)
        # Not from a bucket: what lies there may not be the newest yet.
        records = run.metrics.records() if jax.process_index() == 0 else []
        summary = last_validation(records, unit)
        if "transformer" in parts:
            exported = as_exported(parts, config.export_dtype)
            models = Models(**exported, class_names=run.train.class_names, sampling=config.sampling)
            summary |= run.report(models)
            image = hooks.sample_rows(models, config.seed)
            if jax.process_index() == 0:
                with going_on_without("samples.png"):
                    save_png(workdir / "samples.png", image)
    if jax.process_index() == 0:
        with going_on_without("curves.png"):
            plot(records, workdir, unit)
        summary["minutes, this start"] = (time.monotonic() - started) / 60
        with replacing(workdir / "summary.json") as beside:
            beside.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


class Run:
    """The parts of an experiment, checked before anything is computed."""

    def __init__(self, config: Config, workdir: epath.Path, profile: int = 0):
        self.workdir, self.profile, data = workdir, profile, config.data
        self.train, self.validation = (
            open_source(data.source, split, data.size, data.resize)
            for split in ("train", "validation")
        )
        self.config = config = with_classes(config, len(self.train.class_names))
        check_hosts_agree(config, {"train": self.train, "validation": self.validation})
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh))
        check_hosts(self.mesh)
        if config.train_transformer.steps:
            check_model(config.transformer, self.mesh)
            check_attention(config.transformer)
        check_batches("train_tokenizer", config.train_tokenizer, 1, self.mesh)
        accumulate = config.train_transformer.accumulate
        check_batches("train_transformer", config.train_transformer, accumulate, self.mesh)
        check_tokenizer(config)
        check_start(config)
        if config.report:
            report = find_function("config.report", config.report, REPORT_ARGUMENTS)
            if report is pixel_report.report:
                pixel_report.say_what_is_left_out()  # now, not after hours
        # Read ahead of the first step, so that a file that is missing is said now.
        self.networks = loss_networks(config.train_tokenizer)
        self.pretrained: Tokenizer | None = None
        self.cached: tuple[TokenCache, TokenCache] | None = None
        networks = weights_digest(self.networks) if self.networks else ""
        inputs: dict[str, Any] = {"fingerprint": "", "copies": 0, "networks": networks}
        if config.pretrained_tokenizer:
            if data.tokens:
                # Ahead of a fingerprint, which may take long.
                read_manifest(user_path(data.tokens, "data.tokens"), KIND)
            self.pretrained = load_tokenizer(config.pretrained_tokenizer, self.mesh)
            check_rounding(config, self.pretrained)
            inputs["fingerprint"] = load_fingerprint(
                config.pretrained_tokenizer, "tokenizer", self.pretrained
            )
            if data.tokens:
                self.cached = self.open_cache(inputs["fingerprint"])
                inputs["copies"] = self.cached[0].copies
        splits = {"train": self.train, "validation": self.validation}
        check_replaceable(workdir / "checkpoint")  # ahead of days of training
        occupy(workdir, config, inputs, splits)
        # Older versions never trained a pretrained tokenizer; what they began goes on so.
        begun = lambda: np.array([count_steps(workdir / name) > 0 for name in TRAININGS])
        tokenizer, transformer = of_first(begun, (len(TRAININGS),), bool)
        self.fine_tunes = bool(tokenizer or not transformer)
        if jax.process_index() == 0:
            print(summarize(data.source, splits), flush=True)
        self.metrics = Metrics(workdir)

    def batches(self, source: Source, batch_size: int, augmented: bool = True):
        """An endless stream of this process's share of the batches."""
        data = self.config.data
        return batches(
            source,
            batch_size=batch_size,
            seed=self.config.seed,
            augment=augment_items(flip=data.flip, shift=data.shift) if augmented else None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=data.workers,
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer: trained here, or taken from another checkpoint, or both."""
        if self.pretrained and not (self.config.train_tokenizer.steps and self.fine_tunes):
            return self.pretrained
        task = task_of(self.config, "tokenizer")
        every, where = self.config.every, {"workdir": self.workdir}
        frozen = replicate(self.networks)
        state = loop.run(
            task,
            self.batches(self.train, task.config.batch_size),
            mesh=self.mesh,
            seed=self.config.seed,
            directory=self.workdir / "tokenizer",
            metrics=self.metrics,
            every=every,
            frozen=frozen,
            hooks=(
                hooks.validation(
                    every.evaluate, task, self.validation, mesh=self.mesh, frozen=frozen
                ),
                hooks.reconstructions(every.sample, task, self.validation, self.metrics, **where),
            ),
            initialize=self.pretrained and functools.partial(self.start_tokenizer, self.pretrained),
            profile=self.profile,
        )
        return state.autoencoder.best

    def transformer(self, tokenizer: Tokenizer) -> Backbone:
        """The transformer, trained on cached tokens or on images."""
        config = self.config
        frozen = {"quantizer": tokenizer.quantizer} if self.cached else {"tokenizer": tokenizer}
        task = task_of(config, "transformer")
        source, validation = self.cached or (self.train, self.validation)
        models = Models(tokenizer, None, self.train.class_names, config.sampling)  # type: ignore
        every, where = config.every, {"seed": config.seed, "workdir": self.workdir}
        state = loop.run(
            task,
            self.batches(source, task.config.batch_size, augmented=not self.cached),
            mesh=self.mesh,
            seed=config.seed,
            directory=self.workdir / "transformer",
            metrics=self.metrics,
            every=every,
            frozen=frozen,
            hooks=(
                hooks.validation(every.evaluate, task, validation, mesh=self.mesh, frozen=frozen),
                hooks.samples(every.sample, task, models, self.metrics, **where),
            ),
            initialize=self.start_transformer if config.init_from else None,
            profile=self.profile,
        )
        return state.transformer.best

    def start_tokenizer(self, given: Tokenizer, state: TokenizerState) -> TokenizerState:
        """Step 0 with the weights of a tokenizer, none of whose codes is out of use."""
        if jax.process_index() == 0:
            print(f"the tokenizer of {self.config.pretrained_tokenizer} is fine-tuned", flush=True)
        model = self.config.tokenizer
        params = jax.tree.map(jnp.copy, tokenizer_at(given, model))
        tokens = self.config.train_tokenizer.batch_size * num_tokens(model.patch_nums)
        stats = init_stats(params.quantizer.codebook[...], tokens / model.vocab_size)
        return state._replace(autoencoder=start_from(state.autoencoder, params), codebook=stats)

    def start_transformer(self, state: TransformerState) -> TransformerState:
        """Step 0 with the weights of `config.init_from`."""
        learner, names = state.transformer, self.train.class_names
        params = transformer_from(learner.params, self.config.init_from, names)
        return state._replace(transformer=start_from(learner, params))

    def save(self, parts: dict[str, Any]) -> None:
        """The checkpoint of what was trained.

        A transformer of `pretrained_tokenizer` whose tokens stayed as they are comes along.
        """
        config, names = self.config, self.train.class_names
        decoder_only = self.pretrained and config.train_tokenizer.decoder_only
        given = abstract_models(config.pretrained_tokenizer)[2] if decoder_only else {}
        if "transformer" in given and "transformer" not in parts:
            kept = load_models(config.pretrained_tokenizer, self.mesh)
            parts, names = {**parts, "transformer": kept.transformer}, kept.class_names
            config = dataclasses.replace(config, sampling=kept.sampling)
        save_models(self.workdir / "checkpoint", parts, names, config)

    def open_cache(self, fingerprint: str) -> tuple[TokenCache, TokenCache]:
        """The token cache on disk, both splits. Raises: BadInput if it does not fit this run."""
        data, patch_nums = self.config.data, self.config.tokenizer.patch_nums
        options = {name: getattr(data, name) for name in ("size", "resize", "flip", "shift")}
        options |= {"seed": self.config.seed}
        return (
            open_tokens(data.tokens, "train", fingerprint, patch_nums, self.train, **options),
            open_tokens(
                data.tokens, "validation", fingerprint, patch_nums, self.validation, **options
            ),
        )

    def report(self, models: Models) -> dict[str, float]:
        """What the config's `report` finds, if it names one."""
        if not self.config.report:
            return {}
        function = find_function("config.report", self.config.report, REPORT_ARGUMENTS)
        draw = functools.partial(hooks.draw_samples, models, seed=self.config.seed + 1)
        reconstruct = functools.partial(reconstruct_images, models.tokenizer)
        try:
            found = function(self.train, self.validation, draw, reconstruct)
            return {str(name): float(value) for name, value in found.items()}
        except (BadInput, Failure, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # whatever the user's code does
            raise BadInput(
                f"config.report={self.config.report} failed with {describe(error)}."
            ) from error


def last_validation(records: list[dict], unit: str) -> dict[str, float]:
    """The newest validation figures of both trainings, the transformer's loss in this unit."""
    shown = {
        "tokenizer": ("val_psnr", "validation PSNR (dB)"),
        "transformer": ("val_loss", f"validation loss ({unit})"),
    }
    found = {}
    for record in records:
        figure, name = shown.get(record["stage"], ("", ""))
        if record.get("hook") == "validation":  # which lacks a figure that was not finite
            found.pop(name, None)
        if figure in record:
            found[name] = record[figure]
    return found


def plot(records: list[dict], workdir: epath.Path, unit: str) -> None:
    """curves.png from the records of metrics.jsonl."""

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
        f"transformer: loss ({unit})": both("transformer", "loss"),
        "transformer: accuracy": both("transformer", "accuracy"),
        "transformer: loss by scale": {
            n.removeprefix("loss_"): line("transformer", n) for n in by_scale
        },
        "learning rate": {s: line(s, "learning_rate") for s in ("tokenizer", "transformer")},
    }
    drawn = {title: lines for title, lines in panels.items() if any(x for x, _ in lines.values())}
    if drawn:  # a training that did not run has no panels
        curves(workdir / "curves.png", drawn)
