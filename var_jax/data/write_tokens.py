"""The fingerprint of a model's weights."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
from flax import nnx

from var_jax.sharding.ops import path_name


def fingerprint(model: nnx.Module) -> str:
    """16 hex digits that tell a model's config and weights from any other's."""
    config = model.config  # type: ignore[attr-defined]
    # Fields at their default are left out, so that a new one changes no fingerprint.
    told = {
        f.name: value
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]
