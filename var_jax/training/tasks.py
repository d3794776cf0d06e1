"""The trainings of an experiment, by name."""

from var_jax.config import Config
from var_jax.training.autoregressive import autoregressive_task
from var_jax.training.diffusion import diffusion_task
from var_jax.training.task import Task
from var_jax.training.tokenizer import tokenizer_task

KINDS = {"var": autoregressive_task, "raster": autoregressive_task, "dit": diffusion_task}


def task_of(config: Config, name: str) -> Task:
    """The training of the "tokenizer" or of the "transformer", of whatever kind that is."""
    if name == "tokenizer":
        return tokenizer_task(config.tokenizer, config.train_tokenizer)
    return KINDS[config.transformer.kind](config.transformer, config.train_transformer)
