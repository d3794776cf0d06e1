"""pFID replaces tokens by near ones, always the same, and as often as it says."""

import numpy as np

from var_jax.evaluation.tokenizer import NEAREST, nearest_codes, perturb

CODEBOOK = np.random.default_rng(0).standard_normal((512, 3)).astype(np.float32)


def test_nearest_codes():
    found = nearest_codes(CODEBOOK)
    exact = np.linalg.norm(CODEBOOK[:, None] - CODEBOOK, axis=2).argsort(axis=1)
    count = round(512 * NEAREST)
    assert found.shape == (512, count) == (512, 12)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(exact[:, :count], axis=1))
    assert nearest_codes(CODEBOOK[:8]).shape == (8, 2) and nearest_codes(CODEBOOK[:1]).shape[1] == 1


def test_perturb():
    tokens = np.random.default_rng(1).integers(0, 512, (200, 85)).astype(np.int32)
    nearest = nearest_codes(CODEBOOK)
    found = perturb(tokens, nearest)
    assert found.dtype == np.int32 and (nearest[tokens] == found[..., None]).any(-1).all()
    changed = (found != tokens).mean()
    assert abs(changed - 0.5 * 11 / 12) < 0.02  # one in twelve draws is the code itself
    np.testing.assert_array_equal(perturb(tokens, nearest), found)
