"""Joined parts are one npz."""

import numpy as np

from var_jax.infra.npz import join_npz, load_npz, save_npz


def test_joined_parts_are_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        "arr_0": rng.integers(0, 255, (7, 4, 4, 3), np.uint8),
        "labels": rng.integers(0, 9, 7).astype(np.int32),
    }
    paths = [tmp_path / f"{start}.npz" for start in (0, 3, 6)]
    for start, path in zip((0, 3, 6), paths, strict=True):
        save_npz(path, **{name: array[start : start + 3] for name, array in whole.items()})
    join_npz(tmp_path / "all.npz", paths, 7)
    joined = load_npz(tmp_path / "all.npz")
    assert list(joined) == list(whole)
    for name, array in whole.items():
        assert joined[name].dtype == array.dtype
        np.testing.assert_array_equal(joined[name], array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.npz", "3.npz", "6.npz", "all.npz"]
