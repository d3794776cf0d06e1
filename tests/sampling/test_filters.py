"""Top-k and top-p leave the probabilities that the public implementation leaves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import load

from var_jax.models import backend
from var_jax.sampling.filters import top_k, top_p

GOLD = load("filters")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", [name for name in GOLD if name.startswith("probs")])
def test_golden(name, platform):
    k, p = re.fullmatch(r"probs_k(\d+)_p([\d.]+)", name).groups()
    with backend.assume(platform):
        probabilities = jax.nn.softmax(top_p(top_k(jnp.asarray(GOLD["logits"]), int(k)), float(p)))
    np.testing.assert_allclose(probabilities, GOLD[name], atol=1e-6)


def test_top_p_keeps_the_best():
    kept = top_p(jnp.array([[0.0, 5.0, 1.0]]), 1e-9)
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, False]])
