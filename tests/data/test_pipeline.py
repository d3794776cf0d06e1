"""The input pipeline on a source of numbered items, so that every row can be recognized."""

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from var_jax import BadInput, Failure
from var_jax.data import pipeline
from var_jax.data.augmentation import augment_items
from var_jax.data.pipeline import batches, epoch
from var_jax.data.sources import Emoji


class Numbers:
    """Item i holds three tokens i, as a token cache would."""

    class_names = ("number",)

    def __init__(self, count: int):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        self.read.append(index)
        return {"tokens": np.full(3, index, np.int32), "label": np.int32(index % 7)}

    def train_item(self, index, epoch, rng):
        return self[index]


def add_noise(item, rng):
    return item | {"noise": rng.random(2)}


def take(iterator, steps, key="tokens"):
    """The values of `key` in the next `steps` batches, one row an item."""
    return np.concatenate([next(iterator)[key] for _ in range(steps)])


def test_batch_stacks_every_key():
    batch = next(batches(Numbers(50), batch_size=8, seed=0))
    assert batch["tokens"].shape == (8, 3) and batch["tokens"].dtype == np.int32
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert (batch["label"] == batch["tokens"][:, 0] % 7).all()


def test_epochs_are_different_permutations():
    seen = take(batches(Numbers(60), batch_size=8, seed=0), 15)[:, 0].reshape(2, 60)
    assert (np.sort(seen, axis=1) == np.arange(60)).all()
    assert (seen[0] != seen[1]).any() and (seen[0] != np.arange(60)).any()


def test_seed_decides_order_and_augmentation():
    def run(seed, key):
        return take(batches(Numbers(60), batch_size=30, seed=seed, augment=add_noise), 4, key)

    for key in ("tokens", "noise"):
        assert (run(3, key) == run(3, key)).all()
        assert (run(3, key) != run(4, key)).any()
    # Seeds must not be the same epochs moved on by one.
    assert (run(3, "tokens")[60:] != run(4, "tokens")[:60]).any()


def test_every_item_has_its_own_noise_in_every_epoch():
    noise = take(batches(Numbers(5), batch_size=20, seed=0, augment=add_noise), 3, "noise")
    assert len(np.unique(noise)) == noise.size


def test_resume_is_exact_in_the_middle_of_an_epoch():
    def start():
        return batches(Numbers(50), batch_size=8, seed=1, augment=add_noise)

    first = start()
    take(first, 9)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(10)]
    fresh = start()
    fresh.set_state(state)
    first.set_state(state)  # going back is resuming too
    for want in expected:
        for got in (next(fresh), next(first)):
            assert all((got[key] == want[key]).all() for key in want)


@pytest.mark.parametrize("key", ["tokens", "noise"])
def test_processes_split_the_global_batch(key):
    def start(**process):
        return batches(Numbers(50), batch_size=12, seed=2, augment=add_noise, **process)

    whole = start()
    parts = [start(process_index=p, process_count=3) for p in range(3)]
    for _ in range(10):
        joined = np.concatenate([next(part)[key] for part in parts])
        assert (joined == next(whole)[key]).all()
    assert whole.get_state() == parts[0].get_state()  # so a run may resume on other processes


def test_augmented_emoji():
    source = Emoji("validation")
    plain, moved = (
        next(batches(source, batch_size=16, seed=0, augment=augment))
        for augment in (None, augment_items(flip=True, shift=3))
    )
    assert moved["image"].shape == (16, 32, 32, 3) and moved["image"].dtype == np.uint8
    assert (moved["label"] == plain["label"]).all()
    assert (moved["image"] != plain["image"]).any((1, 2, 3)).all()


def test_batch_larger_than_the_source():
    seen = take(batches(Numbers(5), batch_size=32, seed=0), 5)[:, 0]
    assert (np.bincount(seen) == 32).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": Numbers(0)}, "data source is empty"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 9, "process_count": 2}, "batch_size is 9; .* multiple of the 2 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2; expected 0 to 1"),
        ({"workers": -1}, r"data\.workers is -1"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967295"),
    ],
)
def test_bad_input(change, sentence):
    with pytest.raises(BadInput, match=sentence):
        batches(**({"source": Numbers(10), "batch_size": 4, "seed": 0} | change))


def test_epoch_pads_the_last_batch():
    seen = list(epoch(Numbers(10), batch_size=4))
    assert [batch["mask"].tolist() for batch in seen[:2]] == [[True] * 4] * 2
    assert seen[2]["mask"].tolist() == [True, True, False, False]
    assert all(batch["tokens"].shape == (4, 3) for batch in seen)
    valid = np.concatenate([batch["tokens"][batch["mask"], 0] for batch in seen])
    assert (valid == np.arange(10)).all()


@pytest.mark.parametrize("count", [5, 10, 12, 13])
def test_epoch_shares_batches_among_processes(count):
    whole = list(epoch(Numbers(count), batch_size=6))
    read = [[], [], []]

    def share(process):
        source = Numbers(count)
        source.read = read[process]
        return list(epoch(source, batch_size=6, process_index=process, process_count=3))

    parts = [share(process) for process in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for want, *got in zip(whole, *parts, strict=True):
        assert all((np.concatenate([part[key] for part in got]) == want[key]).all() for key in want)
    for process in range(3):  # an entirely padded part reads the last item
        own = {row for row in range(count) if row % 6 // 2 == process}
        assert own <= set(read[process]) <= own | {count - 1}


def test_one_thread_permutes_an_epoch():
    pipeline._permutation.cache_clear()
    source = Numbers(200_000)
    stream = pipeline._Stream(source, 1, 0, None)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(stream.__getitem__, range(8)))
    assert pipeline._permutation.cache_info().misses == 1


@pytest.mark.slow
def test_worker_processes_resume_anywhere():
    def start(**how):
        return batches(Numbers(50), batch_size=8, seed=1, augment=add_noise, **how)

    threads, workers = start(), start(workers=2)
    for _ in range(5):
        assert (next(workers)["noise"] == next(threads)["noise"]).all()
    assert workers.get_state() == threads.get_state()
    one = start(workers=1)
    one.set_state(workers.get_state())
    state = one.get_state()
    for _ in range(3):
        assert (next(one)["noise"] == next(threads)["noise"]).all()
    one.set_state(state)  # going back is resuming too
    threads.set_state(state)
    assert (next(one)["noise"] == next(threads)["noise"]).all()


def test_too_little_shared_memory_is_told_before_training(monkeypatch):
    room = shutil.disk_usage("/")._replace(free=64 * 2**20)  # docker's default
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    source = Emoji("validation", 64)  # 12 kB each
    sentence = r"data.workers=4 takes 90\d MB .* of 50\.\d MB, and /dev/shm has 67 MB free; .*=1g"
    with pytest.raises(BadInput, match=sentence):
        batches(source, batch_size=4096, seed=0, workers=4)
    assert batches(source, batch_size=64, seed=0, workers=4)


@pytest.mark.slow
def test_workers_outlive_the_signals_that_end_a_run():
    """Of Ctrl-C, of a closed terminal, of Slurm: the run itself saves, and needs no batch."""
    stream = batches(Numbers(50), batch_size=8, seed=0, workers=2)
    take(stream, 4)  # both have begun
    children = multiprocessing.active_children()
    assert len(children) >= 2
    for child in children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child.pid, number)
    take(stream, 100)


@pytest.mark.slow
def test_a_worker_that_dies_ends_training_in_a_sentence():
    stream = batches(Numbers(50), batch_size=8, seed=0, workers=2)
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(Failure, match=r"a worker .* died \(exit code -9\): memory may be"):
        take(stream, 100)


def test_rows_are_what_training_sees():
    stream = take(batches(Numbers(10), batch_size=10, seed=1, augment=add_noise), 3, "noise")
    order = take(batches(Numbers(10), batch_size=10, seed=1), 3)[:, 0].reshape(3, 10)
    rows = range(7, 25)
    found = list(pipeline.epoch(Numbers(10), 4, rows=rows, seed=1, augment=add_noise))
    mask = np.concatenate([batch["mask"] for batch in found])
    assert mask.sum() == len(rows) and mask[: len(rows)].all()
    noise = np.concatenate([batch["noise"] for batch in found])[mask]
    for row, got in zip(rows, noise, strict=True):
        epoch, index = divmod(row, 10)
        place = 10 * epoch + order[epoch].tolist().index(index)
        assert (got == stream[place]).all()


def test_epoch_refuses_an_empty_batch():
    with pytest.raises(BadInput, match="batch_size is 0"):
        next(epoch(Numbers(10), batch_size=0))
