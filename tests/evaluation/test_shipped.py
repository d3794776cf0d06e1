"""The checkpoint in the package is as good as the README says."""

import jax
import numpy as np
import pytest

from var_jax.data.sources import open_source
from var_jax.evaluation.report import arrays, features, fit
from var_jax.infra.mesh import make_mesh, put_whole, to_host
from var_jax.sampling.generate import generate
from var_jax.training.export import load_models
from var_jax.training.tokenizer_stage import to_float


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=-1, fsdp=1, tensor=1)


def test_it_reconstructs_held_out_pictures(mesh):
    images = arrays(open_source("emoji", "validation", 32))[0]

    def psnr(tokenizer, image):
        image = to_float(image)
        again = tokenizer.decode(tokenizer.encode(image))
        return -10 * jax.numpy.log10(((image - again) ** 2).mean((1, 2, 3)) / 4)

    with jax.set_mesh(mesh):
        tokenizer = load_models("emoji", mesh).tokenizer
        padded = np.resize(images, (-(-len(images) // 8) * 8, *images.shape[1:]))
        found = to_host(jax.jit(psnr)(tokenizer, put_whole({"image": padded}, mesh)["image"]))
    assert found[: len(images)].mean() > 25


@pytest.mark.slow
def test_its_samples_are_taken_for_their_class(mesh):
    classifier = fit(*arrays(open_source("emoji", "train", 32)))
    images, labels = arrays(open_source("emoji", "validation", 32))
    real = classifier.score(features(images), labels)
    wanted = np.arange(9).repeat(16).astype(np.int32)
    with jax.set_mesh(mesh):
        models = load_models("emoji", mesh)
        drawn = generate(
            models.transformer, models.tokenizer, wanted, batch_size=48, seed=0,
            **models.sampling.arguments,
        )  # fmt: skip
        images = np.concatenate([images for images, _ in drawn])
    assert classifier.score(features(images), wanted) > 0.85 * real
