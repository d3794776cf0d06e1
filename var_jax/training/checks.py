"""What of a config must fit its data, its mesh and the checkpoints that it names."""

import dataclasses
import functools

import jax

from var_jax import BadInput
from var_jax.config import (
    Config,
    TrainConfig,
    TrainTokenizerConfig,
    TransformerConfig,
    parse_lr_scale,
    settings,
)
from var_jax.data.inventory import checksum_of
from var_jax.data.sources import Source
from var_jax.models import backend
from var_jax.models.attention import choose
from var_jax.models.tokenizer import Tokenizer
from var_jax.sampling.exports import abstract_models, as_exported, build
from var_jax.sharding import hosts
from var_jax.sharding.mesh import check_batch
from var_jax.tools.trees import path_name
from var_jax.training.init_from import check_source
from var_jax.training.optimizer import rate_factor
from var_jax.training.tokenizer import with_kept

FINE_TUNED = ("patch_nums", "beta")  # no weight's shape or meaning depends on these
CODEBOOK = "quantizer.codebook"
PATHS = (  # fields, and the section of each
    ("data", "source"), ("data", "tokens"), ("", "pretrained_tokenizer"), ("", "init_from"),
    ("train_tokenizer", "lpips_file"), ("train_tokenizer gan", "dino_file"),
)  # fmt: skip


def with_classes(config: Config, classes: int) -> Config:
    """The config with the number of classes of its data.

    Raises: BadInput if it says another one.
    """
    wanted = config.transformer.num_classes
    if not config.train_transformer.steps or wanted == classes:
        return config
    if wanted:
        raise BadInput(
            f"transformer.num_classes={wanted}, but {config.data.source} has {classes} classes; 0"
            " stands for as many as there are."
        )
    transformer = dataclasses.replace(config.transformer, num_classes=classes)
    return dataclasses.replace(config, transformer=transformer)


def check_hosts_agree(config: Config, splits: dict[str, Source]) -> None:
    """Raises BadInput if hosts have other settings or images: they would wait for each other.

    Paths may differ, and how the data is read.
    """
    if jax.process_count() == 1:
        return
    found = settings(config)
    del found["data"]["workers"]
    for section, name in PATHS:
        of = functools.reduce(dict.__getitem__, section.split(), found)
        of[name] = bool(of[name])
    hosts.check_same("the config", found)
    held = {name: [len(each), checksum_of(each), each.class_names] for name, each in splits.items()}
    hosts.check_same(f"what data.source={config.data.source} holds", held)


def check_attention(config: TransformerConfig) -> None:
    """Raises BadInput if cuDNN's attention is asked for where it does not run."""
    chosen = choose(backend.compute_dtype(config.dtype), config.head_dim)
    if config.attention == "cudnn" and chosen != "cudnn":
        raise BadInput(
            "attention=cudnn does not run here: it needs an NVIDIA GPU from Ampere on, dtype"
            " bfloat16 and heads whose width is a multiple of 8, at most 128; auto takes it where"
            " it runs."
        )


def check_batches(name: str, config: TrainConfig, parts: int, mesh: jax.sharding.Mesh) -> None:
    """Raises BadInput if a training with steps cannot split its batches over the mesh."""
    if config.steps:
        check_batch(f"{name}.batch_size", config.batch_size, mesh)
        if parts > 1:
            what = f"{name}.batch_size / {name}.accumulate"
            check_batch(what, config.batch_size // parts, mesh)


def check_rounding(config: Config, tokenizer: Tokenizer) -> None:
    """Raises BadInput if the export would round an encoder that `decoder_only` keeps."""
    if not config.train_tokenizer.decoder_only:
        return
    stored = as_exported(tokenizer, config.export_dtype)
    same = jax.tree.map(jax.numpy.array_equal, stored, tokenizer)
    if not all(map(bool, jax.tree.leaves(same))):
        raise BadInput(
            f"export_dtype={config.export_dtype} rounds the weights of"
            f" {config.pretrained_tokenizer}, and train_tokenizer.decoder_only=True keeps the"
            " tokens that they give; expected float32."
        )


def check_tokenizer(config: Config) -> None:
    """Raises BadInput if there would be no trained tokenizer, or another than the config's."""
    training = config.train_tokenizer
    if config.pretrained_tokenizer:
        _, _, parts = abstract_models(config.pretrained_tokenizer)
        wanted, found = map(dataclasses.asdict, (config.tokenizer, parts["tokenizer"].config))
        for name in FINE_TUNED if training.steps and training.decoder_only else ():
            if found[name] != wanted[name]:
                raise BadInput(
                    f"tokenizer.{name}={wanted[name]} is another than in"
                    f" {config.pretrained_tokenizer}, whose encoder and tokens"
                    f" train_tokenizer.decoder_only=True keeps; expected {found[name]}."
                )
        for name in wanted:
            if found[name] != wanted[name] and not (training.steps and name in FINE_TUNED):
                raise BadInput(
                    f"{config.pretrained_tokenizer} holds a tokenizer with {name}={found[name]},"
                    f" but config.tokenizer.{name} is {wanted[name]}; it goes with the config that"
                    " trained it (emoji with --config emoji:large)."
                )
        if training.steps and not training.decoder_only and config.data.tokens:
            raise BadInput(
                f"data.tokens={config.data.tokens} holds the codes of"
                f" {config.pretrained_tokenizer}, and train_tokenizer.steps={training.steps} change"
                " its encoder; set steps to 0, or train_tokenizer.decoder_only."
            )
        return
    if training.steps and training.decoder_only:
        raise BadInput(
            "train_tokenizer.decoder_only=True keeps the encoder of a trained tokenizer; name its"
            " checkpoint as --config.pretrained_tokenizer=DIR."
        )
    if not training.steps:
        raise BadInput(
            "train_tokenizer.steps=0 leaves the tokenizer untrained; name a checkpoint that holds"
            " one as --config.pretrained_tokenizer=DIR."
        )
    if config.data.tokens:
        raise BadInput(
            f"data.tokens={config.data.tokens} holds the codes of a tokenizer; name its checkpoint"
            " as --config.pretrained_tokenizer=DIR."
        )


def check_start(config: Config) -> None:
    """Raises BadInput where `init_from` or `lr_scale` would mean nothing."""
    if config.init_from and not (config.train_transformer.steps and config.pretrained_tokenizer):
        raise BadInput(
            f"init_from={config.init_from} starts the training of a transformer on the tokens of a"
            " tokenizer: train_transformer.steps and pretrained_tokenizer must be set."
        )
    if config.init_from:
        check_source(config.init_from, config.transformer)
    for name, models in (("tokenizer", config.tokenizer), ("transformer", config.transformer)):
        rules = parse_lr_scale(getattr(config, f"train_{name}").lr_scale)
        paths = jax.tree_util.tree_leaves_with_path(build(models)) if rules else []
        for rule, _ in rules:
            if not any(rule.search(path_name(path)) for path, _ in paths):
                known = ", ".join(path_name(path) for path, _ in paths[:8])
                raise BadInput(
                    f"train_{name}.lr_scale: no weight of the {name} is called {rule.pattern!r};"
                    f" they are {known}, ..."
                )
        if config.train_tokenizer.steps and name == "tokenizer" and rules:
            check_rates(config.train_tokenizer, [path_name(path) for path, _ in paths])


def check_rates(config: TrainTokenizerConfig, names: list[str]) -> None:
    """Raises BadInput where `lr_scale` leaves the tokenizer's weights or codes untrained."""
    at = "train_tokenizer."
    given, config = f"{at}lr_scale={config.lr_scale}", with_kept(config)
    if not any(rate_factor(config, name) for name in names):
        also = f", and {at}decoder_only=True all others" if config.decoder_only else ""
        what = "the decoder" if config.decoder_only else "all weights"
        raise BadInput(f"{given} freezes {what}{also}; expected a factor above 0.")
    factor = rate_factor(config, CODEBOOK)
    if config.kmeans_steps and not factor:
        raise BadInput(
            f"{given} freezes {CODEBOOK}, which alone learns in the first"
            f" {at}kmeans_steps={config.kmeans_steps}; set one of them."
        )
    if config.codebook_decay and factor not in (0, 1):
        raise BadInput(
            f"{given} scales the learning rate of {CODEBOOK} by {factor:g}, but with"
            f" {at}codebook_decay={config.codebook_decay} codes are moving averages and have none;"
            f" expected 0 or 1, as by {CODEBOOK}=1 ahead of the other rules."
        )
