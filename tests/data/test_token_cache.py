"""The token cache on disk: what it holds, that it resumes, what it refuses, that losses agree."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from var_jax import BadInput
from var_jax.checkpoints.export import fingerprint
from var_jax.config import TokenizerConfig, TrainTransformerConfig, TransformerConfig
from var_jax.data import records, token_cache
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches
from var_jax.data.sources import ArraySource
from var_jax.data.token_cache import open_tokens, write_cache
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.tokenizer import encode_images
from var_jax.sharding.mesh import make_mesh, put_batch
from var_jax.training.autoregressive import autoregressive_task

SIZES = dict(patch_nums=(1, 2), vocab_size=32, latent_dim=8)
TINY = TokenizerConfig(
    **SIZES, channels=8, channel_mults=(1,), num_res_blocks=0, norm_groups=4, patch_size=4,
)  # fmt: skip


def make(seed):
    """A tokenizer with noise for weights: initialising one compiles for long."""
    rng = np.random.default_rng(seed)
    noise = lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(noise, jax.eval_shape(lambda: make_tokenizer(TINY, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def tokenizer():
    return make(0)


@pytest.fixture(scope="module")
def sources():
    """Images larger than the 8 pixels of the tokenizer, so that crops differ."""
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    labels = np.arange(24, dtype=np.int32) % 3
    make = lambda part: ArraySource(images[part], labels[part], ("a", "b", "c"), size=8, resize=1.5)
    return {"train": make(slice(18)), "validation": make(slice(18, None))}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=-1, fsdp=1, tensor=1)


HOW = dict(batch_size=8, copies=2, seed=5, flip=True)


@pytest.fixture(scope="module")
def cache(tokenizer, sources, mesh, tmp_path_factory):
    """A cache in shards of four images, written in two goes."""
    folder = epath.Path(tmp_path_factory.mktemp("cache"))
    patch = pytest.MonkeyPatch()
    patch.setattr("var_jax.data.token_cache.shard_size", lambda count: 4)
    written, write_shard = [], records.write_shard

    def dies_after_five(path, rows):
        if len(written) == 5:
            next(iter(rows))  # in the middle of a shard
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, rows)

    with jax.set_mesh(mesh):
        patch.setattr(records, "write_shard", dies_after_five)
        with pytest.raises(KeyboardInterrupt):
            write_cache(tokenizer, sources, folder, mesh=mesh, **HOW)
        with pytest.raises(BadInput, match="is unfinished"):
            opened(folder, tokenizer, sources, "train")
        with pytest.raises(BadInput, match="begun with flip=true, not false"):
            write_cache(tokenizer, sources, folder, mesh=mesh, **(HOW | {"flip": False}))
        times = [path.stat().mtime for path in written]
        patch.setattr(records, "write_shard", write_shard)
        write_cache(tokenizer, sources, folder, mesh=mesh, **HOW)
        assert times == [path.stat().mtime for path in written]
    patch.undo()
    return folder


def opened(cache, tokenizer, sources, split, schedule=SIZES["patch_nums"], **how):
    return open_tokens(str(cache), split, fingerprint(tokenizer), schedule, sources[split], **how)


def test_it_holds_what_training_sees(cache, tokenizer, sources, mesh):
    source = opened(cache, tokenizer, sources, "train")
    assert len(source) == 18 and source.class_names == ("a", "b", "c")
    assert source[0]["tokens"].shape == (5,) and source[0]["tokens"].dtype == np.int32
    pixels = batches(sources["train"], batch_size=12, seed=5, augment=augment_items(flip=True))
    codes = batches(source, batch_size=12, seed=5)
    with jax.set_mesh(mesh):
        for _ in range(3):  # two epochs
            want, got = next(pixels), next(codes)
            padded = np.resize(want["image"], (16, *want["image"].shape[1:]))
            tokens = encode_images(tokenizer, put_batch({"x": padded}, mesh)["x"])
            assert (np.asarray(tokens)[:12] == got["tokens"]).all()
            assert (want["label"] == got["label"]).all()
    rng = np.random.default_rng(0)
    crops = [
        [source.train_item(i, epoch, rng)["tokens"].tolist() for i in range(18)]
        for epoch in range(3)
    ]
    assert crops[0] == crops[2] and crops[0] != crops[1]


def test_one_of_two_hosts_writes_the_same_cache(
    cache, tokenizer, sources, mesh, tmp_path, monkeypatch
):
    monkeypatch.setattr("var_jax.data.token_cache.shard_size", lambda count: 4)
    out = epath.Path(tmp_path) / "shared"
    with jax.set_mesh(mesh):
        write_cache(tokenizer, sources, out, mesh=mesh, host=0, hosts=2, **HOW)
    names = {path.name for path in cache.iterdir()}
    assert names == {path.name for path in out.iterdir()} and len(names) > 4
    for name in names:
        assert (cache / name).read_bytes() == (out / name).read_bytes()


def test_validation_is_the_centre(cache, tokenizer, sources, mesh):
    source = opened(cache, tokenizer, sources, "validation")
    images = np.stack([sources["validation"][i]["image"] for i in range(6)])
    with jax.set_mesh(mesh):
        padded = put_batch({"x": np.resize(images, (8, *images.shape[1:]))}, mesh)["x"]
        tokens = np.asarray(encode_images(tokenizer, padded))[:6]
    assert (tokens == np.stack([source[i]["tokens"] for i in range(6)])).all()


@pytest.mark.slow
def test_training_from_it_gives_the_losses_of_pixels(cache, tokenizer, sources, mesh):
    model = TransformerConfig(**SIZES, num_classes=3, depth=1, width=16, num_heads=1)
    config = TrainTransformerConfig(steps=4, batch_size=8, warmup_steps=1)
    task = autoregressive_task(model, config)
    source = opened(cache, tokenizer, sources, "train")
    streams = (
        batches(
            sources["train"],
            batch_size=8,
            seed=5,
            augment=augment_items(flip=True),
        ),
        batches(source, batch_size=8, seed=5),
    )
    losses = []
    with jax.set_mesh(mesh):
        step, key = jax.jit(task.train_step), jax.random.key(0)
        start = jax.jit(task.init)(key)
        for stream in streams:
            state, found = start, []
            for _ in range(4):
                batch = put_batch(next(stream), mesh)
                state, metrics = step(state, batch, {"tokenizer": tokenizer}, key)
                found.append(float(metrics["loss"]))
            losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert len(set(losses[0])) == 4


def test_another_tokenizer_or_schedule_is_refused(cache, tokenizer, sources):
    other = make(1)
    ours, theirs = fingerprint(tokenizer), fingerprint(other)
    assert ours == fingerprint(make(0)) != theirs
    with pytest.raises(BadInput, match=f'with tokenizer="{ours}", .* has tokenizer="{theirs}"'):
        opened(cache, other, sources, "train")
    with pytest.raises(BadInput, match=r"patch_nums=\[1, 2\], but .* patch_nums=\[1, 2, 3\]"):
        opened(cache, tokenizer, sources, "train", (1, 2, 3))


def test_other_crops_and_images_are_refused(cache, tokenizer, sources):
    assert opened(cache, tokenizer, sources, "train", flip=True)
    with pytest.raises(BadInput, match="made with flip=true, but this run has flip=false"):
        opened(cache, tokenizer, sources, "train", flip=False)
    with pytest.raises(BadInput, match="made with seed=5, but this run has seed=0"):
        opened(cache, tokenizer, sources, "train", flip=True, seed=0)
    with pytest.raises(BadInput, match=r"made with resize=null, but this run has resize=1\.0"):
        opened(cache, tokenizer, sources, "train", resize=1.0)
    train = sources["train"]
    for change, sentence in (
        ({"images": 255 - train.images}, "made with checksum_of_train_images="),
        ({"labels": 2 - train.labels}, "made with checksum_of_train_images="),
        (
            {"images": train.images[:-1], "labels": train.labels[:-1]},
            "train_images=18, but this run has train_images=17",
        ),
        ({"class_names": ("a", "b", "d")}, "made with class_names="),
    ):
        other = {"train": dataclasses.replace(train, **change)}
        with pytest.raises(BadInput, match=sentence):
            opened(cache, tokenizer, other, "train")


def test_a_lost_shard_is_written_again(cache, tokenizer, sources, mesh):
    path = next(cache.glob("train-00003-*"))
    whole = path.read_bytes()
    path.unlink()
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr("var_jax.data.token_cache.shard_size", lambda count: 4)
        write_cache(tokenizer, sources, cache, mesh=mesh, **HOW)
    assert path.read_bytes() == whole


def test_missing_shards_and_other_folders(cache, tokenizer, sources, tmp_path):
    path = next(cache.glob("train-00002-*"))
    path.rename(tmp_path / path.name)
    with pytest.raises(BadInput, match=r"train-00002-of-00009.array_record is missing"):
        opened(cache, tokenizer, sources, "train")
    whole = (tmp_path / path.name).read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(BadInput, match=r"train-00002-of-00009.array_record is damaged"):
        opened(cache, tokenizer, sources, "train")[8]
    path.write_bytes(whole)
    with pytest.raises(
        BadInput, match=r"has no manifest\.json; expected a folder of a token cache"
    ):
        opened(tmp_path, tokenizer, sources, "train")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match=r"manifest\.json cannot be read: expected JSON"):
        opened(tmp_path, tokenizer, sources, "train")


def test_checksum_reads_only_the_images_it_needs():
    images, labels = np.zeros((2000, 32, 32, 3), np.uint8), np.zeros(2000, np.int32)
    tracemalloc.start()
    token_cache.checksum_of(ArraySource(images, labels, ("a",), size=32))
    assert tracemalloc.get_traced_memory()[1] < images.nbytes / 20
    tracemalloc.stop()


def test_too_many_codes():
    with pytest.raises(BadInput, match=r"65537 codes .* has room for 65536"):
        token_cache.check_counts(65537, 10)
