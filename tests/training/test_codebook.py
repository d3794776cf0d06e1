"""Codes follow what they stand for; unused ones start anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.sharding.mesh import make_mesh, put_batch
from var_jax.training.codebook import (
    batch_stats,
    codes_by_scale,
    init_stats,
    random_tokens,
    update_codebook,
)


def test_a_used_code_moves_to_the_mean_of_its_residuals_and_an_unused_one_restarts():
    residual = jnp.array([[[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]])
    idx = jnp.array([[0, 0, 1]])
    codebook = jnp.full((3, 2), 100.0)
    new, stats, restarted, perplexity = update_codebook(
        codebook, init_stats(codebook), idx, residual, jax.random.key(0), 0.5, 0.03
    )
    assert perplexity == pytest.approx(3 / 4 ** (1 / 3), rel=1e-5)  # of two codes, 2:1 and 0
    np.testing.assert_allclose(new[:2], [[2, 0], [0, 5]], atol=1e-6)
    assert restarted.tolist() == [False, False, True]
    assert any((new[2] == row).all() for row in residual[0])  # one of this batch
    assert (stats.hits > 0).all()


def test_a_trained_codebook_outlives_its_first_batch_and_restarts_can_be_off():
    codebook = jnp.arange(12.0).reshape(6, 2)
    idx, residual = jnp.zeros((1, 12), jnp.int32), jnp.ones((1, 12, 2))
    update = lambda hits, restart: update_codebook(
        codebook, init_stats(codebook, hits), idx, residual, jax.random.key(0), 0.9, restart
    )
    new, _, restarted, _ = update(2.0, 0.03)
    np.testing.assert_allclose(new[1:], codebook[1:], rtol=1e-6)
    np.testing.assert_allclose(new[0], (1.8 * codebook[0] + 1.2) / 3, rtol=1e-6)
    assert not restarted.any()
    assert update(0.0, 0.03)[2].tolist() == [False] + [True] * 5
    assert not update(0.0, 0.0)[2].any()


def test_each_scale_may_have_its_share_of_restarts():
    key, patch_nums, L = jax.random.key(0), (1, 1, 4), 18
    places = np.asarray(random_tokens(key, 900, 5, L, patch_nums)) % L
    assert (places == 0).mean() == pytest.approx(1 / 3, abs=0.05)
    assert (places == 1).mean() == pytest.approx(1 / 3, abs=0.05)
    assert set(places) == set(range(L))
    anywhere = np.asarray(random_tokens(key, 900, 5, L))
    assert (anywhere % L == 0).mean() == pytest.approx(1 / L, abs=0.03)
    assert anywhere.min() == 0 and anywhere.max() == 5 * L - 1


@pytest.mark.slow
def test_stats_count_and_pick():
    idx = jnp.array([[2, 0], [2, 1]])
    residual = jnp.arange(8.0).reshape(2, 2, 2)
    rows = jnp.array([3, 0, 1])
    hits, total, picked, counted = batch_stats(idx, residual, rows)
    np.testing.assert_array_equal(hits, [1, 1, 2])
    np.testing.assert_array_equal(total[2], [4.0, 6.0])
    np.testing.assert_array_equal(picked, [[6, 7], [0, 1], [2, 3]])
    np.testing.assert_array_equal(counted, [1, 1, 1])
    counts = jnp.array([[True, True], [True, False]])
    hits, total, _, counted = batch_stats(idx, residual, rows, counts)
    np.testing.assert_array_equal(hits, [1, 0, 2])
    np.testing.assert_array_equal(total[1], [0.0, 0.0])
    np.testing.assert_array_equal(counted, [0, 1, 1])


def test_tokens_that_do_not_count_move_and_restart_nothing():
    """Alike on a mesh."""
    rng, V = np.random.default_rng(0), 40
    codebook = jnp.asarray(rng.normal(size=(V, 2)), jnp.float32)
    batch = {
        "idx": rng.integers(0, V // 2, (8, 21)).astype(np.int32),
        "residual": rng.normal(size=(8, 21, 2)).astype(np.float32),
        "counts": np.arange(21) < rng.integers(1, 22, (8, 1)),
    }

    def run(batch):
        return update_codebook(
            codebook, init_stats(codebook), batch["idx"], batch["residual"], jax.random.key(0),
            0.9, 0.03, (1, 2, 4), batch["counts"],
        )  # fmt: skip

    new, stats, dead, _ = found = run(jax.tree.map(jnp.asarray, batch))
    seen = np.bincount(batch["idx"][batch["counts"]], minlength=V)
    of_codes = np.isclose(stats.hits, 0.1 * seen, rtol=1e-5)
    assert of_codes[~dead].all() and 0 < dead.sum() < (seen == 0).sum()
    left_out = batch["residual"][~batch["counts"]]
    assert not (np.asarray(new)[:, None] == left_out[None]).all(-1).any()
    mesh = make_mesh(4, 2, 1)
    with jax.set_mesh(mesh):
        there = jax.jit(run)(put_batch(batch, mesh))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_codes_of_each_scale_are_counted_alike_on_a_mesh():
    idx = np.array([[5, 0, 1, 2, 2], [5, 0, 0, 0, 2]] * 4, np.int32)
    alone = codes_by_scale(jnp.asarray(idx), 7, (1, 2))
    np.testing.assert_array_equal(alone, [1, 3])
    mesh = make_mesh(4, 2, 1)
    with jax.set_mesh(mesh):
        there = jax.jit(lambda idx: codes_by_scale(idx, 7, (1, 2)))(
            put_batch({"i": idx}, mesh)["i"]
        )
    np.testing.assert_array_equal(alone, there)
