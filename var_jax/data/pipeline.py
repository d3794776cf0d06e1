"""From a source to batches: endless, shuffled and resumable for training, in order for evaluation.

Items are dicts of NumPy arrays with any keys; a batch stacks them key by key.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int64

from var_jax import BadInput
from var_jax.data.sources import Source

Batch = dict[str, np.ndarray]
Augment = Callable[[Batch, np.random.Generator], Batch]


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    augment: Augment | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches of `source` for ever, each epoch a new permutation; arrays (b, ...) a key.

    `batch_size` counts all processes and may exceed the source: b = batch_size / process_count.
    Process p gets rows p·b ... (p+1)·b of the global batch, whatever their number, so joining the
    processes always gives the same batch. `augment` maps an item and its own generator to an item.

    `get_state()` is a small JSON-able dict, the number of batches taken; `set_state` resumes
    exactly, with another `process_count` too.

    Raises: BadInput if the source is empty or the sizes or the seed make no sense.
    """
    _check(source, batch_size, seed, process_index, process_count)
    stream = _Stream(source, batch_size // process_count, seed, augment)
    dataset = grain.MapDataset.source(stream)[process_index::process_count]
    # One thread makes one batch, so as many batches wait in memory as there are threads.
    threads = min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(dataset.to_iter_dataset(options))


def epoch(source: Source, batch_size: int) -> Iterator[Batch]:
    """Every item once, in order; adds `mask`, bool (batch_size,), False where the last is padding.

    Padding repeats the last item, so that it is valid input for any model.

    Raises: BadInput if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}; expected at least 1.")
    count = len(source)
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        batch = _stack([source[int(i)] for i in rows.clip(max=count - 1)])
        yield batch | {"mask": rows < count}


class _Stream:
    """Random access to the batches of an endless shuffled stream; grain adds threads and state.

    grain's own shuffle, repeat, random_map and batch cost 60 to 150 µs an item in Python, several
    times what a small picture costs, because its shuffle is slow on sets of a few thousand.
    """

    def __init__(self, source: Source, size: int, seed: int, augment: Augment | None):
        self._source, self._size, self._seed, self._augment = source, size, seed, augment
        self._order = functools.lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        return sys.maxsize // self._size

    def __getitem__(self, index: int) -> Batch:
        positions = range(index * self._size, (index + 1) * self._size)
        items = []
        for position in positions:
            epoch, offset = divmod(position, len(self._source))
            items.append(self._source[int(self._order(epoch)[offset])])
        if self._augment is not None:
            # Each item draws by its place in the stream, whichever process and thread makes it.
            generators = _generators(self._seed, positions)
            items = [self._augment(*pair) for pair in zip(items, generators, strict=True)]
        return _stack(items)

    def _permutation(self, epoch: int) -> Int64[np.ndarray, " n"]:
        # Raw bits, because NumPy may change what `permutation` makes of them between versions.
        bits = np.random.Philox(key=[self._seed, 0], counter=[0, 0, 0, epoch])
        return np.argsort(bits.random_raw(len(self._source)), kind="stable")


def _generators(seed: int, positions: Iterable[int]) -> Iterator[np.random.Generator]:
    """An independent generator for each position: one object, rewound, as making one is slow."""
    bits = np.random.Philox(key=[seed, 1])
    fresh = bits.state
    generator = np.random.Generator(bits)
    for position in positions:
        fresh["state"]["counter"] = np.array([0, 0, 0, position], np.uint64)
        bits.state = fresh
        yield generator


def _stack(items: Sequence[Batch]) -> Batch:
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


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
