"""Images from disk: a small set of every kind is read alike."""

import io
import json
import tarfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from var_jax import BadInput, prepare
from var_jax.data import records
from var_jax.data.pipeline import batches, epoch
from var_jax.data.sources import ArraySource, imagenet, open_encoded, open_source
from var_jax.data.sources.imagenet import WNID, readable
from var_jax.data.sources.packed import pack
from var_jax.data.sources.tars import TARS
from var_jax.tools import cli

COLOURS = {"n00000001": (200, 30, 30), "n00000002": (30, 200, 30), "n00000003": (30, 30, 200)}


def jpeg(colour, shade):
    """A plain image: its colour is its class, its shade its number in the class."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), tuple(min(c + shade, 255) for c in colour)).save(file, "JPEG")
    return file.getvalue()


def write_tree(folder, counts):
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{name}_{i}.JPEG").write_bytes(jpeg(colour, 10 * i))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"), {"train": 5, "val": 2})


def contents(source):
    """{(label, bytes)}, whatever the order."""
    return sorted((label, data) for data, label, _ in map(source.read, range(len(source))))


def test_tree(tree):
    source = open_source(str(tree), "train", 16)
    assert len(source) == 15 and source.class_names == tuple(COLOURS)
    item = source[5]
    assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.uint8
    assert item["label"] == 1 and item["label"].dtype == np.int32
    assert item["image"].argmax(-1).mean() == 1
    assert len(open_source(str(tree), "validation", 16)) == 6


def test_tree_without_splits_holds_out_a_tenth(tmp_path):
    tree = write_tree(tmp_path, {".": 11})
    train, validation = (open_encoded(str(tree), split) for split in ("train", "validation"))
    assert len(train) == 31 and len(validation) == 2
    whole = contents(train) + contents(validation)
    assert len({data for _, data in whole}) == 33
    for path in list((tree / "n00000002").iterdir())[1:]:
        path.unlink()
    with pytest.raises(BadInput, match="class 'n00000002' has 1 images; expected at least 2"):
        open_encoded(str(tree), "train")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: next((t / "train/n00000002").iterdir()).unlink(), "n00000002 holds no images"),
        (lambda t: (t / "val/other").mkdir(), "val has a class 'other' that .*train lacks"),
        (lambda t: (t / "val").rename(t / "holdout"), "no validation or val folder"),
    ],
)  # fmt: skip
def test_bad_trees(tmp_path, change, sentence):
    tree = write_tree(tmp_path, {"train": 1, "val": 1})
    change(tree)
    with pytest.raises(BadInput, match=sentence):
        for split in ("train", "validation"):
            open_source(str(tree), split, 16)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("boat", "train"):
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg((9, 9, 9), i))
    assert open_source(str(tmp_path), "train", 8).class_names == ("boat", "train")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        open_source(str(tmp_path / "nothing"), "train", 16)
    with pytest.raises(BadInput, match="holds no images"):
        open_source(str(tmp_path), "train", 16)
    with pytest.raises(BadInput, match=r"data.resize=0\.5 must be at least 1"):
        open_source(str(tmp_path), "train", 16, 0.5)


def test_prepared_set_is_the_tree(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("var_jax.data.sources.packed.shard_size", lambda count: 4)
    splits = {split: open_encoded(str(tree), split) for split in ("train", "validation")}
    written = []
    write_shard = records.write_shard

    def dies_after_two(path, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, rows)

    monkeypatch.setattr(records, "write_shard", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        pack(splits, epath.Path(tmp_path) / "out")
    with pytest.raises(BadInput, match="out is unfinished"):
        open_source(str(tmp_path / "out"), "train", 16)
    with pytest.raises(BadInput, match="begun with counts="):
        pack({split: splits["validation"] for split in splits}, epath.Path(tmp_path) / "out")
    monkeypatch.setattr(records, "write_shard", write_shard)
    pack(splits, epath.Path(tmp_path) / "out")
    shards = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert shards[0] == "manifest.json" and len(shards) == 1 + 4 + 2 and written[0] in shards
    words = [f"--source={tree}", f"--out={tmp_path / 'out'}"]
    assert cli.call(prepare.main, prepare.define_flags, words) == 0  # nothing is left to do
    counted, done = capsys.readouterr().out.splitlines()
    assert counted == f"{tree}: 15 train and 6 validation images of 3 classes"
    assert done.startswith("15 train and 6 validation images of 3 classes")
    for split, source in splits.items():
        prepared = open_encoded(str(tmp_path / "out"), split)
        assert contents(prepared) == contents(source)
        assert prepared.class_names == source.class_names
        assert prepared.read(0)[2] == f"{tmp_path}/out/{split}/n00000001/n00000001_0.JPEG"
    (tmp_path / "out" / shards[1]).unlink()
    with pytest.raises(BadInput, match=r"train-00000-of-00004\.array_record is missing"):
        open_source(str(tmp_path / "out"), "train", 16)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(folder, tree):
    """Tars as image-net.org distributes them, with the images of `tree`, and a devkit."""
    from scipy.io import savemat

    with tarfile.open(folder / TARS["train"], "w") as outer:
        for name in reversed(COLOURS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in (tree / "train" / name).iterdir():
                    add(tar, path.name, path.read_bytes())
            add(outer, f"{name}.tar", inner.getvalue())
    truth = []
    numbers = {name: i + 1 for i, name in enumerate(reversed(COLOURS))}  # not the order of wnids
    with tarfile.open(folder / TARS["validation"], "w") as tar:
        for i, path in enumerate(sorted((tree / "val").glob("*/*"), key=lambda p: p.name[::-1])):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", path.read_bytes())
            truth.append(numbers[path.parent.name])
    synsets = np.array(
        [(number, name) for name, number in numbers.items()],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object)],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12/data"
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(
            tar,
            f"{root}/ILSVRC2012_validation_ground_truth.txt",
            "\n".join(map(str, truth)).encode(),
        )
        add(tar, f"{root}/meta.mat", meta.getvalue())


def test_imagenet_tars(tree, tmp_path):
    write_tars(tmp_path, tree)
    for split in ("train", "validation"):
        tars, files = open_encoded(str(tmp_path), split), open_encoded(str(tree), split)
        assert contents(tars) == contents(files)
        assert tars.class_names == files.class_names
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no tar")
    with pytest.raises(BadInput, match=r"devkit_t12\.tar\.gz is damaged"):
        open_encoded(str(tmp_path), "validation")
    whole = (tmp_path / TARS["train"]).read_bytes()
    (tmp_path / TARS["train"]).write_bytes(whole[: len(whole) // 3 + 700])
    with pytest.raises(BadInput, match=r"img_train\.tar is damaged"):
        open_encoded(str(tmp_path), "train")
    (tmp_path / TARS["train"]).unlink()
    with pytest.raises(BadInput, match=r"img_train\.tar is missing"):
        open_encoded(str(tmp_path), "train")


def test_english_names_for_imagenet_only():
    assert readable(("n1", "n2")) == ("n1", "n2")
    assert all(WNID.fullmatch(name) for name in COLOURS)
    tfds = pytest.importorskip("tensorflow_datasets")
    labels = (tfds.core.tfds_path() / "datasets/imagenet2012/labels.txt").read_text().split()
    assert readable(labels) == imagenet.class_names(1000)
    assert readable(reversed(labels)) == tuple(reversed(labels))


def test_bad_images_are_replaced_and_named(tmp_path, capfd):
    tree = write_tree(tmp_path, {"train": 3, "val": 1})
    broken = tree / "train/n00000001/n00000001_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    source = open_source(str(tree), "train", 16)
    (tree / "train/n00000002/n00000002_2.JPEG").write_bytes(b"")
    assert (source[1]["image"] == source[2]["image"]).all()
    assert source[5]["label"] == 2  # the next class's first takes the place of the last
    assert len(source.skipped) == 2
    source[1]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "n00000001_1.JPEG: " in warnings[0] and warnings[0].endswith("(1 skipped)")
    parts = [
        batches(source, batch_size=6, seed=1, process_index=p, process_count=2) for p in range(2)
    ]
    whole = batches(source, batch_size=6, seed=1)
    for _ in range(4):
        joined = np.concatenate([next(part)["image"] for part in parts])
        assert (joined == next(whole)["image"]).all()
    for path in tree.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"in a row cannot be read, the last is .*JPEG"):
        source[0]


def test_random_crops_are_by_place_in_the_stream():
    y, x = np.mgrid[:240:8, :240:8].astype(np.uint8)
    images = np.stack([np.stack([y, x, x], axis=-1)] * 15)
    source = ArraySource(images, np.zeros(15, np.int32), ("one",), size=8, resize=2.0)
    first, again = (next(batches(source, batch_size=30, seed=3))["image"] for _ in range(2))
    assert (first == again).all()
    assert len({image.tobytes() for image in first}) > 20
    assert len({image.tobytes() for image in next(epoch(source, 30))["image"]}) == 1


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    labels = np.arange(40) % 2
    np.savez(path, arr_0=images, labels=labels, class_names=np.array(["even", "odd"]))
    train, validation = (open_source(str(path), split, 12) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (34, 6) and train.class_names == ("even", "odd")
    seen = {
        source[i]["image"].tobytes() for source in (train, validation) for i in range(len(source))
    }
    assert seen == {image.tobytes() for image in images}
    assert open_source(str(path), "train", 8)[0]["image"].shape == (8, 8, 3)
    for change, sentence in (
        ({"arr_0": images / 255}, "arr_0 is float64"),
        ({"labels": labels[:-1]}, r"labels is int64 of shape \(39,\)"),
        ({"labels": labels * 2}, "class '1' has 0 images; expected at least 2"),
        ({"class_names": np.array(["a"])}, "has label 1, but 1 class_names"),
    ):
        np.savez(path, allow_pickle=True, **({"arr_0": images, "labels": labels} | change))
        with pytest.raises(BadInput, match=sentence):
            open_source(str(path), "train", 12)
    np.savez(path, images=images)
    with pytest.raises(BadInput, match="expected arr_0 and labels"):
        open_source(str(path), "train", 12)


def test_tfds(tree, tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(BadInput, match=r"not prepared in .*: tfds build tiny --file_format"):
        open_source("tfds:tiny", "train", 16)

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        names = ("n00000003", "n00000001", "n00000002")  # another order than ours

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=self.names),
                "file_name": tfds.features.Text(),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples("train"),
                "test": self._generate_examples("val"),
            }

        def _generate_examples(self, split):
            for path in sorted((tree / split).glob("*/*")):
                item = {"image": path.read_bytes(), "label": path.parent.name}
                yield path.name, item | {"file_name": path.name}

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for split in ("train", "validation"):
        source = open_encoded("tfds:tiny", split)
        assert contents(source) == contents(open_encoded(str(tree), split))
        assert source.class_names == tuple(COLOURS)
        assert source.read(0)[2].endswith(".JPEG")
    assert len(open_encoded("tfds:tiny:1.0.0", "train")) == 15
    with pytest.raises(BadInput, match=r"tfds:tiny:2\.0\.0 is not prepared"):
        open_encoded("tfds:tiny:2.0.0", "train")
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        BadInput, match=r"prepared as tfrecord, .* expected array_record: tfds build"
    ):
        open_encoded("tfds:tiny", "train")


def test_folders_that_are_called_or_filled_as_files_are(tmp_path):
    tree = write_tree(tmp_path / "tree.npz", {"train": 2, "val": 1})
    assert len(open_source(str(tree), "train", 16)) == 2 * len(COLOURS)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-labels-idx1-ubyte.gz").touch()
    with pytest.raises(BadInput, match="holds IDX files; expected idx:"):
        open_source(str(tmp_path / "idx"), "train", 16)


def test_emoji_is_the_package_unless_a_folder_of_that_name_holds_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji" / "checkpoint").mkdir(parents=True)  # a run
    assert len(open_source("emoji", "train", 16)) > 1000
    (tmp_path / "emoji" / "checkpoint").rmdir()
    write_tree(tmp_path / "emoji", {"train": 2, "val": 1})
    with pytest.raises(BadInput, match=r"may mean the images of the package or .* say \./emoji"):
        open_source("emoji", "train", 16)
    assert len(open_source("./emoji", "train", 16)) == 2 * len(COLOURS)
