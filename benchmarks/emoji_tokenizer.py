"""What makes the small emoji tokenizer learn fast: one change at a time, at equal steps.

    python -m benchmarks.emoji_tokenizer [--steps 500]

Prints, for configs/emoji.py and for each change of it, the PSNR of the held-out pictures after so
many steps and the time a step takes, and as a yardstick k-means on raw 8x8 patches with as many
codes. The PSNR does not depend on how busy the machine is; the times do.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np
from sklearn.cluster import MiniBatchKMeans

from configs.emoji import get_config
from var_jax.config import Config, TokenizerConfig, from_dict
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches
from var_jax.data.sources import open_source
from var_jax.evaluation.pixel_report import arrays
from var_jax.sharding.mesh import make_mesh, put_batch
from var_jax.training.loop import evaluate
from var_jax.training.tokenizer import tokenizer_stage

CHANGES = {
    "as configured": {},
    "plain CNN (skip=False)": {"tokenizer": {"skip": False}},
    "codes by gradient (codebook_decay=0)": {"train_tokenizer": {"codebook_decay": 0.0}},
    "no restart of dead codes (restart_below=0)": {"train_tokenizer": {"restart_below": 0.0}},
    "8x8 places of 4x4 pixels, once: 1 2 4 8, 85 tokens": {
        "tokenizer": {"patch_size": 4, "patch_nums": (1, 2, 4, 8)}
    },
    "the finest scale once, 26 tokens": {"tokenizer": {"patch_nums": (1, 1, 2, 2, 4)}},
    "the finest scale three times, 58 tokens": {"tokenizer": {"patch_nums": (1, 1, 2, 2, 4, 4, 4)}},
    "codes of 48 numbers": {"tokenizer": {"latent_dim": 48}},
    "codes of 192 numbers": {"tokenizer": {"latent_dim": 192}},
    "2048 codes": {"tokenizer": {"vocab_size": 2048}},
}


def main() -> None:
    """One row a change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    config = from_dict(Config, get_config().to_dict())
    train = open_source(config.data.source, "train", config.data.size)
    validation = open_source(config.data.source, "validation", config.data.size)
    row("k-means on patches", kmeans_psnr(train, validation, config.tokenizer), None)
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    for name, change in CHANGES.items():
        tokenizer = dataclasses.replace(config.tokenizer, **change.get("tokenizer", {}))
        stage_config = dataclasses.replace(
            config.train_tokenizer, steps=steps, **change.get("train_tokenizer", {})
        )
        stage = tokenizer_stage(tokenizer, stage_config)
        change_items = augment_items(flip=config.data.flip, shift=config.data.shift)
        stream = batches(
            train, batch_size=stage_config.batch_size, seed=config.seed, augment=change_items
        )
        init_key, key = jax.random.split(jax.random.key(config.seed))
        step = jax.jit(stage.train_step, donate_argnums=0)
        with jax.set_mesh(mesh):
            state, times = jax.jit(stage.init)(init_key), []
            for _ in range(steps):
                started = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, put_batch(next(stream), mesh), key))
                times.append(time.perf_counter() - started)
            found = evaluate(stage, state, validation, stage_config.batch_size, mesh=mesh)
        row(name, found["val_psnr"], float(np.median(times)))


def kmeans_psnr(train, validation, config: TokenizerConfig) -> float:
    """Mean PSNR of the held-out pictures when each patch is replaced by its nearest code."""
    images, held_out = arrays(train)[0], arrays(validation)[0]
    codes, side = config.vocab_size, config.patch_size
    means = MiniBatchKMeans(codes, batch_size=8192, n_init=1, random_state=0)
    means.fit(patches(images, side).reshape(-1, side * side * 3))
    real = patches(held_out, side)
    flat = real.reshape(-1, real.shape[-1])
    errors = (flat - means.cluster_centers_[means.predict(flat)]) ** 2
    return float(np.mean(-10 * np.log10(errors.reshape(len(held_out), -1).mean(1))))


def patches(images: np.ndarray, side: int) -> np.ndarray:
    """(N, patches, side·side·3), in [0, 1]."""
    N, H, W, _ = images.shape
    x = images.reshape(N, H // side, side, W // side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(N, -1, side * side * 3).astype(np.float32) / 255


def row(name: str, psnr: float, seconds: float | None) -> None:
    """A line of the table."""
    pace = f" {1000 * seconds:.0f} ms" if seconds else ""
    print(f"| {name} | {psnr:.1f} dB |{pace} |", flush=True)


if __name__ == "__main__":
    main()
