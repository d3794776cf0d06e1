"""What runs beside training at a period of its own: validation, and images to look at."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import UInt8

from var_jax.data.sources import Source
from var_jax.models.load import Models
from var_jax.models.tokenizer import Tokenizer, encode_images
from var_jax.sampling import autoregressive
from var_jax.sampling.generate import coarse_to_fine, collect, generate
from var_jax.sharding.mesh import put_global_batch, to_host
from var_jax.sharding.ops import round_up
from var_jax.tools.images import grid, labelled_rows, save_png
from var_jax.tools.logs import Metrics
from var_jax.training.autoregressive import TransformerState
from var_jax.training.loop import Hook, evaluate
from var_jax.training.task import Frozen, Task
from var_jax.training.tokenizer import TokenizerState

MAX_ROWS, SAMPLES_PER_CLASS = 16, 10  # of samples.png


def validation(
    every: int,
    task: Task,
    source: Source,
    *,
    mesh: jax.sharding.Mesh,
    frozen: Frozen | None = None,
) -> Hook:
    """Figures of the validation set."""
    run = lambda step, state: evaluate(task, state, source, mesh=mesh, frozen=frozen)
    return Hook("validation", every, run)


def reconstructions(
    every: int,
    task: Task,
    source: Source,
    metrics: Metrics,
    *,
    mesh: jax.sharding.Mesh,
    workdir: epath.Path,
) -> Hook:
    """reconstructions.png of the validation set."""

    def run(step: int, state: TokenizerState) -> dict[str, Any]:
        image = reconstruction_rows(state.autoencoder.best, source, mesh)
        show(image, workdir, metrics, task.name, step, "reconstructions")
        return {}

    return Hook("reconstructions", every, run)


def samples(
    every: int, task: Task, frozen: Models, metrics: Metrics, *, seed: int, workdir: epath.Path
) -> Hook:
    """samples.png, of the models in `frozen` with the transformer as it is."""

    def run(step: int, state: TransformerState) -> dict[str, Any]:
        models = frozen._replace(transformer=state.transformer.best)
        image = sample_rows(models, seed, task.config.batch_size // task.parts)
        show(image, workdir, metrics, task.name, step, "samples")
        return {}

    return Hook("samples", every, run)


def show(
    image: UInt8[np.ndarray, "H W 3"],
    workdir: epath.Path,
    metrics: Metrics,
    task: str,
    step: int,
    name: str,
) -> None:
    """Writes an image for people, once for all processes."""
    if jax.process_index() == 0:
        save_png(workdir / f"{name}.png", image)
    metrics.image(task, step, name, image)


def reconstruction_rows(
    tokenizer: Tokenizer, source: Source, mesh: jax.sharding.Mesh, count: int = 12
) -> UInt8[np.ndarray, "H W 3"]:
    """A row an image: original, reconstruction, and the image after each scale."""
    rows = np.linspace(0, len(source) - 1, count).astype(int)
    originals = np.stack([source[int(i)]["image"] for i in rows])
    padded = np.resize(originals, (round_up(count), *originals.shape[1:]))
    tokens = to_host(encode_images(tokenizer, put_global_batch(padded, mesh)))[:count]
    steps = everywhere(*coarse_to_fine(tokenizer, tokens), count)
    strip = np.concatenate([originals[:, None], steps[:, -1:], steps], axis=1)
    scale = max(1, 64 // originals.shape[1])
    return grid(strip.reshape(-1, *originals.shape[1:]), columns=strip.shape[1], scale=scale)


def sample_rows(models: Models, seed: int, batch_size: int = 64) -> UInt8[np.ndarray, "H W 3"]:
    """A row of samples a class, its name beside it; of many classes the first."""
    names = models.class_names[:MAX_ROWS]
    labels = np.repeat(np.arange(len(names), dtype=np.int32), SAMPLES_PER_CLASS)
    images = draw_samples(models, labels, seed, min(batch_size, 64))
    rows = images.reshape(len(names), SAMPLES_PER_CLASS, *images.shape[1:])
    return labelled_rows(dict(zip(names, rows, strict=True)), max(1, 64 // images.shape[1]))


def draw_samples(
    models: Models, labels: np.ndarray, seed: int, batch_size: int = 64
) -> UInt8[np.ndarray, "N H W 3"]:
    """Samples of these classes, as `sample` draws them from the export, on every process."""
    sampler = autoregressive.sampler(models.sampling)
    weights = autoregressive.Weights(models.tokenizer, models.transformer)
    made = collect(generate(sampler, weights, labels, batch_size=batch_size, seed=seed))
    return everywhere(made.rows, made.images, len(labels))


def everywhere(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The `count` rows of all processes, each of which has some of them, on every process."""
    if jax.process_count() == 1:
        return values
    mine = np.zeros((count, *values.shape[1:]), values.dtype)
    mine[rows] = values
    return process_allgather(mine).sum(axis=0, dtype=values.dtype)
