"""From a source to batches: endless, shuffled and resumable for training, in order for evaluation.

Items are dicts of NumPy arrays with any keys; a batch stacks them key by key.
"""

import functools
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags
from jaxtyping import Int64

from var_jax import BadInput, Failure
from var_jax.data.sources import Source
from var_jax.tools import ending

Batch = dict[str, np.ndarray]
Augment = Callable[[Batch, np.random.Generator], Batch]
_PERMUTATION_LOCK = threading.Lock()
SHARED = "/dev/shm"
ORPHAN = 5.0  # seconds between a worker's looks for its process


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    augment: Augment | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Batches of `source` for ever, each epoch a new permutation; arrays (b, ...) a key.

    `batch_size` counts all processes and may exceed the source: b = batch_size / process_count.
    Process p gets rows p·b ... (p+1)·b of the global batch, whatever their number, so joining the
    processes always gives the same batch. `augment` maps an item and its own generator to an item.

    `get_state()` is a small JSON-able dict, the number of batches taken; `set_state` resumes
    exactly, with another `process_count` or number of `workers` too.

    Threads make the batches, about 2,000 images a second; beyond that use `workers` processes.

    Raises: BadInput if the source is empty, the sizes or the seed make no sense, or the workers
    have no room to hand over batches.
    """
    _check(source, batch_size, seed, process_index, process_count)
    if workers < 0:
        raise BadInput(f"data.workers is {workers}; expected at least 0.")
    size = batch_size // process_count
    if workers:
        _check_shared_memory(source, size, workers)
    stream = _Stream(source, size, seed, augment)
    dataset = grain.MapDataset.source(stream)[process_index::process_count]
    return _Workers(dataset, workers) if workers else iter(dataset.to_iter_dataset(_threads()))


def epoch(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    seed: int | None = None,
    augment: Augment | None = None,
) -> Iterator[Batch]:
    """Every item once, in order; adds `mask`, bool (b,), False where an item is padding.

    Batches are shared among processes as by `batches`: each reads its own rows only, and all get
    the same number of batches. Padding repeats the last item, which is valid input for any model.

    Other `rows` may be given: row e·N + i is item i of N in epoch e, with a `seed` as `batches` of
    that seed and `augment` yields it. So what training would see can be stored part by part.

    Raises: BadInput if the sizes or the seed make no sense.
    """
    _check(source, batch_size, seed or 0, process_index, process_count)
    rows = range(len(source)) if rows is None else rows
    size = batch_size // process_count
    stream = None if seed is None else _Stream(source, size, seed, augment)
    read = stream.of_row if stream else lambda row: source[row % len(source)]

    def batch(index: int) -> Batch:
        own = rows[index * size : (index + 1) * size]
        items = [read(row) for row in own or rows[-1:]]
        items += items[-1:] * (size - len(items))
        return _stack(items) | {"mask": np.arange(size) < len(own)}

    count = -(-len(rows) // batch_size) * process_count
    dataset = grain.MapDataset.range(count).map(batch)[process_index::process_count]
    return iter(dataset.to_iter_dataset(_threads()))


def _threads() -> grain.ReadOptions:
    # One thread makes one batch, so as many batches wait in memory as there are threads.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(16, usable or 1)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)


class _Workers(grain.DatasetIterator):
    """Batches from worker processes; started anew by `set_state`.

    Its state is that of threads, a number: grain's own is tied to the number of workers, and
    `grain.experimental.get_next_index` refuses several (0.2.18).
    """

    def __init__(self, dataset: grain.MapDataset, workers: int):
        super().__init__()
        self._dataset, self._workers = dataset, workers
        self._next, self._batches = 0, None
        if not flags.FLAGS.is_parsed():  # grain reads a flag of its own
            flags.FLAGS.mark_as_parsed()

    def __next__(self) -> Batch:
        if self._batches is None:
            options = grain.MultiprocessingOptions(num_workers=self._workers)
            rest = self._dataset[self._next :].to_iter_dataset(_threads())
            self._batches = iter(rest.mp_prefetch(options, worker_init_fn=_ignore_signals))
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if not (
                code := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            ):
                raise
            why = f"{SHARED} is full" if int(code[1]) == -signal.SIGBUS else "memory may be full"
            raise Failure(
                f"a worker that makes batches died (exit code {code[1]}): {why}; a smaller"
                " data.workers needs less, and 0 makes them in this process"
            ) from error
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next, self._batches = state["next_index"], None


def _ignore_signals(index: int, count: int) -> None:
    """In a worker: a terminal or Slurm signals it too, but its process saves, and then ends it.

    It ends by itself where that process is gone.
    """
    for number in filter(None, ending.SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(ORPHAN)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Stream:
    """Random access to the batches of an endless shuffled stream; grain adds threads and state.

    grain's own shuffle, repeat, random_map and batch cost 60 to 150 µs an item in Python, several
    times what a small image costs, because its shuffle is slow on sets of a few thousand.
    """

    def __init__(self, source: Source, size: int, seed: int, augment: Augment | None):
        self._source, self._size, self._seed, self._augment = source, size, seed, augment

    def __len__(self) -> int:
        return sys.maxsize // self._size

    def __getitem__(self, index: int) -> Batch:
        return _stack([*self._items(range(index * self._size, (index + 1) * self._size))])

    def of_row(self, row: int) -> Batch:
        """The item that `epoch` has at this row."""
        epoch, index = divmod(row, len(self._source))
        _, offsets = self._permutation(epoch)
        return next(self._items([row - index + int(offsets[index])]))

    def _items(self, positions: Sequence[int]) -> Iterator[Batch]:
        """Each item draws by its place in the stream, whichever process and thread makes it."""
        bits = np.random.Philox(key=[self._seed, 1])
        state, rng = bits.state, np.random.Generator(bits)
        for position in positions:
            # One generator, set back for each item: a new one takes 30 µs.
            state["state"]["counter"] = np.array([0, 0, 0, position], np.uint64)
            bits.state = state
            epoch, offset = divmod(position, len(self._source))
            order, _ = self._permutation(epoch)
            item = self._source.train_item(int(order[offset]), epoch, rng)
            yield self._augment(item, rng) if self._augment else item

    def _permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        with _PERMUTATION_LOCK:  # else all threads compute an epoch's permutation at its start
            return _permutation(self._seed, len(self._source), epoch)


@functools.lru_cache(maxsize=4)
def _permutation(
    seed: int, count: int, epoch: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """The order of the items in an epoch, and the inverse: where each item is in it."""
    # Raw bits, because NumPy may change what `permutation` makes of them between versions.
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, 0, epoch])
    order = np.argsort(bits.random_raw(count), kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(count)
    return order, inverse


def _stack(items: Sequence[Batch]) -> Batch:
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


def _check_shared_memory(source: Source, rows: int, workers: int) -> None:
    """Raises BadInput if too little is free where workers hand over batches.

    Else the system would kill a worker amid training, by a bus error without a word.
    """
    if not os.path.isdir(SHARED):  # not on Linux
        return
    batch = rows * sum(array.nbytes for array in source[0].values())
    wanted, free = (4 * workers + 2) * batch, shutil.disk_usage(SHARED).free  # 4w + 1 measured
    if wanted > free:
        raise BadInput(
            f"data.workers={workers} takes {wanted / 1e6:.0f} MB of shared memory for batches of"
            f" {batch / 1e6:.1f} MB, and {SHARED} has {free / 1e6:.0f} MB free; use fewer, or 0, or"
            f" give it more (docker run --shm-size={wanted // 10**9 + 1}g)."
        )


def _check(source: Source, batch_size: int, seed: int, process_index: int, process_count: int):
    if len(source) == 0:
        raise BadInput("The data source is empty; expected at least one item.")
    if not 0 <= process_index < process_count:
        raise BadInput(f"process_index is {process_index}; expected 0 to {process_count - 1}.")
    if batch_size < 1 or batch_size % process_count:
        raise BadInput(
            f"batch_size is {batch_size}; expected a positive multiple of the {process_count}"
            " processes."
        )
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed is {seed}; expected 0 to {2**32 - 1}.")
