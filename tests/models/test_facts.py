"""Sizes, initial values and resampling of the public implementation."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from golden_cases import facts, load

from var_jax.checkpoints.torch.names import to_torch
from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.models.resize import area_matrix, bicubic_matrix
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512, num_tokens, phi_indices


def count(build):
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(build)))


@pytest.mark.slow
def test_parameter_counts():
    known = facts()
    assert (
        count(lambda: Tokenizer(TokenizerConfig(), rngs=nnx.Rngs(0))) == known["params_tokenizer"]
    )
    for depth in (16, 20, 24, 30, 36):
        config = TransformerConfig.from_depth(depth)
        name = f"params_d{depth}" + ("_shared_adaln_512" if depth == 36 else "")
        assert count(lambda c=config: Transformer(c, rngs=nnx.Rngs(0))) == known[name]
        assert config.drop_path == pytest.approx(known["drop_path_rate"][str(depth)])


@pytest.mark.slow
def test_initial_values_have_the_release_statistics():
    """Means and stds at d16's width; two layers are enough, but the depth enters the std."""
    config = TransformerConfig.from_depth(16)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    tensors = to_torch(model)
    for name, (mean, std) in facts()["init_std_d16"].items():
        noise = std / tensors[name].size ** 0.5
        assert abs(tensors[name].mean() - mean) < 10 * noise + 1e-6, name
        assert tensors[name].std() == pytest.approx(std, rel=0.05, abs=1e-7), name


def test_resize_matrices():
    for key, matrix in load("resize").items():
        kind, size_in, size_out = re.fullmatch(r"(\w+)_(\d+)_(\d+)", key).groups()
        build = {"bicubic": bicubic_matrix, "area": area_matrix}[kind]
        np.testing.assert_allclose(build(int(size_in), int(size_out)), matrix, atol=2e-6)


def test_schedules_and_phi():
    assert num_tokens(PATCH_NUMS_256) == 680 and num_tokens(PATCH_NUMS_512) == 2240
    assert phi_indices(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_indices(10, 10) == tuple(range(10)) and phi_indices(3, 1) == (0, 0, 0)
