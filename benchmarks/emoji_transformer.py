"""What the small emoji transformer gains from what: one change at a time, at equal pictures seen.

    python -m benchmarks.emoji_transformer --checkpoint runs/emoji/checkpoint [--steps 300]

Takes the tokenizer of a finished run of configs/emoji.py, and prints, for that config and for each
change of it, after so many steps of 32 pictures: the loss on held-out pictures and on the last
training batches (nats a token), how often a classifier takes samples for their class (in terms of
its rate on real pictures), how far apart samples of a class are, and the time a picture takes. The
times depend on how busy the machine is, the rest does not.
"""

import argparse
import dataclasses
import functools
import time

import jax
import numpy as np

from configs.emoji import get_config
from var_jax.config import Config, from_dict
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches
from var_jax.data.sources import open_source
from var_jax.evaluation.pixel_report import report
from var_jax.models.load import Models, load_tokenizer
from var_jax.sharding.mesh import make_mesh, put_batch
from var_jax.train import check_tokenizer, draw
from var_jax.training.autoregressive import transformer_stage
from var_jax.training.loop import evaluate
from var_jax.training.tokenizer import reconstruct

TRAIN, MODEL = "train_transformer", "transformer"
RATE = get_config().train_transformer.learning_rate
CHANGES = {
    "as configured": {},
    "AdamW instead of Muon": {TRAIN: {"optimizer": "adamw"}},
    "no mistakes": {TRAIN: {"mistakes": 0.0}},
    "nothing mirrored": {"data": {"flip": False}},
    "batches of 16": {TRAIN: {"batch_size": 16}},
    "batches of 64": {TRAIN: {"batch_size": 64}},
    "cosine": {TRAIN: {"schedule": "cos"}},
    "twice the learning rate": {TRAIN: {"learning_rate": 2 * RATE}},
    "half the learning rate": {TRAIN: {"learning_rate": RATE / 2}},
    "width 128": {MODEL: {"width": 128, "num_heads": 2}},
    "width 256": {MODEL: {"width": 256, "num_heads": 4}},
    "2 layers": {MODEL: {"depth": 2}},
    "8 layers": {MODEL: {"depth": 8}},
}


def main() -> None:
    """One row a change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="", help="changes whose name has this in it")
    arguments = parser.parse_args()
    config = from_dict(Config, get_config().to_dict())
    check_tokenizer(dataclasses.replace(config, pretrained_tokenizer=arguments.checkpoint))
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(arguments.checkpoint, mesh)
        for name, change in CHANGES.items():
            if arguments.only in name:
                row(name, changed(config, change, arguments.steps), tokenizer, mesh)


def changed(config: Config, change: dict, steps: int) -> Config:
    """The config with this change, as many pictures long as `steps` of the unchanged one."""
    pictures = steps * config.train_transformer.batch_size
    parts = {n: dataclasses.replace(getattr(config, n), **values) for n, values in change.items()}
    config = dataclasses.replace(config, **parts)
    stage = config.train_transformer
    stage = dataclasses.replace(stage, steps=pictures // stage.batch_size)
    return dataclasses.replace(config, train_transformer=stage)


def row(name: str, config: Config, tokenizer, mesh) -> None:
    """Trains, draws, and prints a line of the table."""
    train, validation = (
        open_source(config.data.source, split, config.data.size)
        for split in ("train", "validation")
    )
    how = config.train_transformer
    stage = transformer_stage(config.transformer, how)
    augment = augment_items(flip=config.data.flip, shift=config.data.shift)
    stream = batches(train, batch_size=how.batch_size, seed=config.seed, augment=augment)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    step, frozen = jax.jit(stage.train_step, donate_argnums=0), {"tokenizer": tokenizer}
    state, losses, times = jax.jit(stage.init)(init_key), [], []
    for _ in range(how.steps):
        started = time.perf_counter()
        state, values = step(state, put_batch(next(stream), mesh) | frozen, key)
        losses.append(float(values["loss"]))
        times.append(time.perf_counter() - started)
    held_out = evaluate(stage, state, validation, 32, mesh=mesh, constants=frozen)["val_loss"]
    models = Models(tokenizer, state.best, train.class_names, config.sampling)
    found = report(
        train,
        validation,
        functools.partial(draw, models, seed=config.seed + 1),
        functools.partial(reconstruct, tokenizer, mesh=mesh),
    )
    pace = 1000 * float(np.median(times)) / how.batch_size
    print(
        f"| {name} | {held_out:.2f} | {np.mean(losses[-max(len(losses) // 20, 1) :]):.2f}"
        f" | {found['samples / real']:.2f} | {found['distance within a class, samples']:.2f}"
        f" | {pace:.1f} ms |",
        flush=True,
    )


if __name__ == "__main__":
    main()
