"""The checkpoint in the package is as good as benchmarks/emoji.md says."""

import functools

import jax
import pytest

from var_jax.data.sources import open_source
from var_jax.evaluation.pixel_report import arrays, report
from var_jax.evaluation.scores import psnr
from var_jax.sampling.exports import load_models
from var_jax.sampling.generate import reconstruct_images
from var_jax.sharding.mesh import make_mesh
from var_jax.training.hooks import draw_samples


@pytest.fixture(scope="module")
def shipped():
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        models = load_models("emoji", mesh)
        yield models, functools.partial(reconstruct_images, models.tokenizer)


def test_it_reconstructs_held_out_images(shipped):
    images = arrays(open_source("emoji", "validation", 32))[0]
    assert psnr(images, shipped[1](images)).mean() > 26


@pytest.mark.slow
def test_its_samples_are_of_their_class_and_vary(shipped):
    models, again = shipped
    train, validation = (open_source("emoji", split, 32) for split in ("train", "validation"))

    draw = functools.partial(draw_samples, models, seed=1)
    found = report(train, validation, draw, again)
    assert found["class agreement, samples / validation"] > 1.2
    assert found["near-copies, samples"] < 0.29
    assert found["distance within a class, samples"] > 0.29
