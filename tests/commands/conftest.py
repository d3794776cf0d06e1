"""A checkpoint for commands that need one, but no good one."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import get_config

from var_jax.config import Config, from_dict
from var_jax.data.sources import open_source
from var_jax.sampling.exports import build, save_models


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A tiny checkpoint of random weights: 16×16 pixels, scales 1 2 4, the classes of the emoji."""
    config = from_dict(Config, get_config().to_dict())
    names = open_source("emoji", "train", 16).class_names
    models = {"tokenizer": build(config.tokenizer), "transformer": build(config.transformer)}
    rng = np.random.default_rng(0)  # initialising them as usual would compile for 10 s
    models = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), models)
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    save_models(folder, models, names, config)
    return folder


@pytest.fixture
def other(untrained, tmp_path):
    """The same weights, of classes that are not the emoji's."""
    folder = tmp_path / "other"
    shutil.copytree(untrained, folder)
    about = json.loads((folder / "config.json").read_text())
    about.pop("checksums", None)
    (folder / "config.json").write_text(json.dumps(about | {"class_names": list("abcdefghi")}))
    return folder
