"""Images in npz files, and parts joined to one."""

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.tools.npz import NpzImages, join_npz, load_npz, save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, save_npz])
def test_batches(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, labels=np.arange(5), arr_0=IMAGES)
    images = NpzImages(path)
    assert images.shape == (5, 4, 6, 3)
    batches = list(images.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": IMAGES}, "holds images, expected 'arr_0'"),
        ({"arr_0": IMAGES / 255}, "'arr_0' as float64 of shape"),
        ({"arr_0": IMAGES[..., 0]}, r"uint8 of shape \(5, 4, 6\); expected uint8 images"),
        ({"arr_0": IMAGES[:0]}, r"of shape \(0, 4, 6, 3\)"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "stored by columns"),
        ({"arr_0": np.array([{}], object)}, "'arr_0' as object"),
    ],
)
def test_other_arrays(tmp_path, arrays, sentence):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadInput, match=sentence):
        NpzImages(tmp_path / "a.npz")


def test_damaged_files(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        NpzImages(path)
    path.write_bytes(b"<html>")
    with pytest.raises(BadInput, match="is no npz file"):
        NpzImages(path)
    np.savez(path, arr_0=IMAGES)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(IMAGES[3].tobytes(), bytes(72)))
    with pytest.raises(BadInput, match="or a damaged one"):
        list(NpzImages(path).batches(2))


def test_damaged_parts(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, arr_0=IMAGES)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(BadInput, match="or a damaged one"):
        join_npz(tmp_path / "all.npz", [(path, 0)], 5)
    assert not (tmp_path / "all.npz").exists()


def test_joined_parts_are_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        "arr_0": rng.integers(0, 255, (7, 4, 4, 3), np.uint8),
        "labels": rng.integers(0, 9, 7).astype(np.int32),
    }
    paths = [tmp_path / f"{start}.npz" for start in (0, 3, 6)]
    for start, path in zip((0, 3, 6), paths, strict=True):
        save_npz(path, **{name: array[start : start + 3] for name, array in whole.items()})
    save_npz(paths[1], **{name: array[2:6] for name, array in whole.items()})  # repeats a row
    join_npz(tmp_path / "all.npz", [(paths[0], 0), (paths[1], 1), (paths[2], 0)], 7)
    joined = load_npz(tmp_path / "all.npz")
    assert list(joined) == list(whole)
    for name, array in whole.items():
        assert joined[name].dtype == array.dtype
        np.testing.assert_array_equal(joined[name], array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.npz", "3.npz", "6.npz", "all.npz"]
