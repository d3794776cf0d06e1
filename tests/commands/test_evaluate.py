"""evaluate: from images or a checkpoint to the figures, whoever draws and whenever it stops."""

import json

import numpy as np
import PIL.Image
import pytest
from etils import epath
from evaluation_cases import weights_file
from running import complaint, run, start_several

from var_jax.data.sources import open_source
from var_jax.evaluation import features
from var_jax.evaluation.statistics import Moments


@pytest.fixture
def mean_colours(monkeypatch):
    """In place of a network: the colours of four quarters of the image, which compile at once."""

    def quarters(weights, images):
        n, side = images.shape[0], images.shape[1] // 2
        cells = images.reshape(n, 2, side, 2, side, 3).astype("float32").mean((2, 4))
        return cells.reshape(n, 12) / 255 * weights

    network = features.name_network("quarters", features.pool_of(quarters), np.float32(1))
    monkeypatch.setattr("var_jax.evaluate.load_network", lambda spec: network)


def write_images(path, seed, count=40):
    images = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    np.savez(path, arr_0=images, labels=np.arange(count) % 2)
    return images


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_samples_beside_a_reference(tmp_path, mean_colours):
    for name, seed in (("a", 0), ("b", 1)):
        write_images(tmp_path / f"{name}.npz", seed)
    flags = ("--samples", tmp_path / "a.npz", "--out", tmp_path / "out")
    code, out, err = run("evaluate", *flags, "--reference", tmp_path / "b.npz")
    assert code == 0, err
    found = metrics(tmp_path / "out")
    assert found["images"] == 40 and found["features"]["network"] == "quarters"
    assert found["fd_quarters"] > 0 and f"{found['fd_quarters']:.4f}" in out
    saved = tmp_path / "out" / "features" / "reference.npz"
    again = (*flags[:3], tmp_path / "again", "--reference", saved)
    assert run("evaluate", *again)[0] == 0
    assert metrics(tmp_path / "again")["fd_quarters"] == found["fd_quarters"]
    code, _, _ = run("evaluate", *flags, "--reference", tmp_path / "a.npz")
    assert code == 0 and abs(metrics(tmp_path / "out")["fd_quarters"]) < 1e-6


def test_a_reference_is_a_path_of_the_user(tmp_path, mean_colours, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "a.npz", 0)
    flags = ("--samples", "~/a.npz", "--out", tmp_path / "out", "--reference")
    for path in ("~/a.npz", f"file://{tmp_path}/a.npz"):
        code, _, err = run("evaluate", *flags, path)
        assert code == 0, err
    monkeypatch.setattr("var_jax.tools.npz.BOMB_BYTES", 2**10)
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(10**6), features=np.zeros(10**6))
    assert "decompression bomb" in complaint("evaluate", *flags, "~/bomb.npz")


def write_source(folder, seed, count=70):
    """Folders of classes; a tenth of the images is held out."""
    for i, image in enumerate(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3))):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image.astype(np.uint8)).save(folder / "ab"[i % 2] / f"{i:03}.png")


def test_a_reference_is_found_again_and_is_of_its_images(tmp_path, mean_colours):
    write_source(tmp_path / "data", 0)
    write_images(tmp_path / "a.npz", 0)
    flags = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "data")
    flags = (*flags, "--out", tmp_path / "out")
    saved = tmp_path / "out" / "features" / "reference.npz"
    found, times = [], []
    for more in ((), (), ("--split", "validation"), (), "new"):
        if more == "new":  # other images of the same names
            write_source(tmp_path / "data", 1)
            more = ()
        code, _, err = run("evaluate", *flags, *more)
        assert code == 0, err
        found.append(metrics(tmp_path / "out")["fd_quarters"])
        times.append(saved.stat().st_mtime_ns)
    assert found[0] == found[1] == found[3] and len({*found}) == 3
    assert times[0] == times[1] and len({*times}) == 4


def test_sets_of_a_source_are_spread_and_in_order(tmp_path):
    source = open_source("emoji", "validation", 16)
    images = features.SourceImages(source, 70)
    read = [*images.batches(24)]
    assert [len(part) for part in read] == [24, 24, 22] and images.shape == (70, 16, 16, 3)
    wanted = np.linspace(0, len(source) - 1, 70).round().astype(int)
    expected = np.stack([source[int(i)]["image"] for i in wanted])
    np.testing.assert_array_equal(np.concatenate(read), expected)


def test_features_are_kept_and_belong_to_their_images(tmp_path, mean_colours, monkeypatch):
    monkeypatch.setattr(features, "PART", 16)
    images = write_images(tmp_path / "a.npz", 0)
    flags = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "a.npz")
    assert run("evaluate", *flags, "--out", tmp_path / "out")[0] == 0
    paths = sorted((tmp_path / "out" / "features").glob("quarters-*.npz"))
    assert len(paths) == 3
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()  # as if stopped between
    assert run("evaluate", *flags, "--out", tmp_path / "out")[0] == 0
    again = [path.stat().st_mtime_ns for path in paths]
    assert (again[0], again[2]) == (times[0], times[2]) and again[1] > times[1]
    whole = features.Features(tuple(map(epath.Path, paths)), 40).moments("pool")
    cells = images.reshape(40, 2, 8, 2, 8, 3).mean((2, 4)).reshape(40, 12) / 255
    np.testing.assert_allclose(whole.mean, Moments.of(cells).mean, rtol=1e-5)
    np.testing.assert_allclose(whole.covariance, np.cov(cells.T), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_is_sampled_and_swept(tmp_path, untrained, mean_colours):
    flags = ("--checkpoint", untrained, "--reference", "emoji", "--num", 18, "--batch_size", 16)
    code, _, err = run("evaluate", *flags, "--cfg", "0,1.5", "--out", tmp_path / "out")
    assert code == 0, err
    sets = metrics(tmp_path / "out")["sets"]
    assert {"cfg0", "cfg1.5", "held-out images"} == {*sets}
    assert (tmp_path / "out" / "curve.png").exists()
    assert sets["cfg0"]["fd_quarters"] != sets["cfg1.5"]["fd_quarters"]
    with np.load(tmp_path / "out" / "cfg0" / "samples.npz") as samples:
        assert np.bincount(samples["labels"]).tolist() == [2] * 9
    time = (tmp_path / "out" / "cfg0" / "samples.npz").stat().st_mtime_ns
    assert run("evaluate", *flags, "--cfg", "0,1.5", "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "cfg0" / "samples.npz").stat().st_mtime_ns == time
    said = complaint("evaluate", *flags, "--cfg", "0,1.5", "--seed", 1, "--out", tmp_path / "out")
    assert "--seed=0, not 1" in said


@pytest.mark.slow
def test_a_checkpoint_on_data(tmp_path, untrained, mean_colours):
    flags = ("--checkpoint", untrained, "--source", "emoji", "--out", tmp_path / "out")
    assert run("evaluate", *flags, "--likelihood")[0] == 0
    found = metrics(tmp_path / "out")
    by_scale = [found[f"bits_scale{k}"] for k in (1, 2, 3)]
    np.testing.assert_allclose(sum(by_scale), found["bits_per_image"])
    np.testing.assert_allclose(found["bits_per_image"] * np.log(2) / 21, found["loss"])
    assert run("evaluate", *flags, "--tokenizer")[0] == 0
    found = metrics(tmp_path / "out")
    assert found["psnr"] > 0 and found["rfd_quarters"] > 0 and 1 <= found["perplexity_scale3"] <= 64


@pytest.mark.slow
def test_hosts_measure_together(tmp_path, untrained):
    write_source(tmp_path / "data", 1, 80)
    weights = weights_file(tmp_path, "features", "dinov2_224")
    flags = ("--checkpoint", untrained, "--reference", tmp_path / "data", "--num", 8)
    flags = (*flags, "--features", weights, "--batch_size", 8, "--out")
    for out, count in (("one", 1), ("hosts", 2), ("hosts", 2)):  # the last one finds all done
        running = start_several(count, "evaluate", *flags, tmp_path / out, devices=2 // count)
        said = [process.communicate(timeout=500) for process in running]
        assert [process.returncode for process in running] == [0] * count, said
        found = metrics(tmp_path / out)
        assert found["images"] == 8 and found["fd_dinov2_128"] > 0
        assert sum("figures are in" in printed for printed, _ in said) == 1
    alone = metrics(tmp_path / "one")
    for name in ("fd", "kid", "precision"):
        name = f"{name}_dinov2_128"
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "give one of --reference, --likelihood"),
        (("--reference", "emoji"), "give --checkpoint, or --samples"),
        (("--samples", "x.npz", "--likelihood"), "give --checkpoint, or --samples"),
        (("--checkpoint", "emoji", "--likelihood"), "--likelihood needs --source"),
        (("--samples", "none.npz", "--reference", "emoji"), "none.npz"),
        (("--samples", "x.npz", "--reference", "x.npz", "--features", "no.pth"), "no.pth"),
    ],
)
def test_bad_input(tmp_path, flags, sentence):
    assert sentence in complaint("evaluate", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
