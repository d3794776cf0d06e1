"""What runs beside training at a period of its own: validation, and images to look at."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from var_jax.data.sources import Source
from var_jax.models.tokenizer import Tokenizer, encode_images
from var_jax.sampling.autoregressive import Weights
from var_jax.sampling.exports import Models
from var_jax.sampling.generate import coarse_to_fine, generate_all, sampler_of
from var_jax.sharding.rows import in_batches
from var_jax.tools.images import going_on_without, grid, labelled_rows, save_png
from var_jax.tools.logs import Metrics
from var_jax.training.loop import Hook, make_evaluation
from var_jax.training.state import Frozen, TransformerState
from var_jax.training.task import Task
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
    evaluate = make_evaluation(task, source, mesh=mesh, frozen=frozen)
    return Hook("validation", every, lambda step, state: evaluate(state))


def reconstructions(
    every: int,
    task: Task,
    source: Source,
    metrics: Metrics,
    *,
    workdir: epath.Path,
) -> Hook:
    """reconstructions.png of the validation set."""

    def run(step: int, state: TokenizerState) -> dict[str, Any]:
        image = reconstruction_rows(state.autoencoder.best, source)
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
    with going_on_without(f"{name}.png"):
        if jax.process_index() == 0:
            save_png(workdir / f"{name}.png", image)
        metrics.image(task, step, name, image)


def reconstruction_rows(
    tokenizer: Tokenizer, source: Source, count: int = 12
) -> UInt8[np.ndarray, "H W 3"]:
    """A row an image: original, reconstruction, and the image after each scale."""
    rows = np.linspace(0, len(source) - 1, count).astype(int)
    originals = np.stack([source[int(i)]["image"] for i in rows])
    steps = coarse_to_fine(tokenizer, in_batches(encode_images, tokenizer, originals))
    strip = np.concatenate([originals[:, None], steps[:, -1:], steps], axis=1)
    scale = max(1, 64 // originals.shape[1])
    return grid(strip.reshape(-1, *originals.shape[1:]), columns=strip.shape[1], scale=scale)


def sample_rows(models: Models, seed: int, batch_size: int = 64) -> UInt8[np.ndarray, "H W 3"]:
    """A row of samples a class, its name beside it; of many classes the first."""
    names = models.class_names[:MAX_ROWS]
    labels = np.repeat(np.arange(len(names), dtype=np.int32), SAMPLES_PER_CLASS)
    images = draw_samples(models, labels, seed, min(batch_size, 64))
    rows = images.reshape(len(names), SAMPLES_PER_CLASS, *images.shape[1:])
    scale = max(1, 64 // images.shape[1])
    sheet = grid(images, SAMPLES_PER_CLASS, scale=scale)
    with going_on_without("names of classes"):
        sheet = labelled_rows(dict(zip(names, rows, strict=True)), scale)
    return sheet


def draw_samples(
    models: Models, labels: np.ndarray, seed: int, batch_size: int = 64
) -> UInt8[np.ndarray, "N H W 3"]:
    """Samples of these classes, as `sample` draws them from the export, on every process."""
    sampler = sampler_of(models.transformer.config.kind, models.sampling)
    weights = Weights(models.tokenizer, models.transformer)
    batch_size = min(batch_size, len(labels))
    return generate_all(sampler, weights, labels, batch_size=batch_size, seed=seed).images
