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


@pytest.mark.parametrize("keep", [0, 1, None])
def test_all_is_kept_traced_or_not(keep):
    """Also what underflows as a share; a traced 0 is what another value may take the place of."""
    logits = jnp.array([[0.0, 200.0, -200.0]])
    k = keep if keep != 1 else 3
    for run in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(run(top_p)(logits, keep), logits)
        np.testing.assert_array_equal(run(top_k)(logits, k), logits)


def test_top_p_keeps_the_best():
    kept = top_p(jnp.array([[0.0, 5.0, 1.0]]), 1e-9)
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, False]])
