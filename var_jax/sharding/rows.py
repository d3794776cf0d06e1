"""Any number of rows through a program of one batch size, on any mesh and any number of hosts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from var_jax import BadInput
from var_jax.sharding.mesh import put_global_batch, to_host
from var_jax.sharding.ops import on_mesh, round_up


def put(array: np.ndarray) -> jax.Array:
    """Rows that every process holds, onto the mesh if there is one."""
    return put_global_batch(array, jax.sharding.get_mesh()) if on_mesh() else jnp.asarray(array)


def replicate(tree: Any) -> Any:
    """Arrays that every process holds, whole onto each device of the mesh, or the only device."""
    if not on_mesh():
        return jax.device_put(tree)
    sharding = NamedSharding(jax.sharding.get_mesh(), P())
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(put, tree)


def few_sizes(count: int, batch_size: int) -> int:
    """A batch for `count` rows: `batch_size`, or less where a smaller power of two holds them all.

    So that calls with other counts seldom compile another program.
    """
    return min(batch_size, 1 << (count - 1).bit_length())


def in_batches(
    f: Callable[[Any, Any], Any],
    weights: Any,
    rows: Any,
    batch_size: int = 64,
    advance: Callable[[int], object] = lambda count: None,
) -> Any:
    """`f(weights, rows)` of any number of rows, on every process: a batch at a time, padded.

    Rows and results are trees of arrays whose first axis is the batch. After each batch `advance`
    is called with the number of its rows.

    Raises: BadInput for a batch size below 1.
    """
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}; expected at least 1.")
    count = len(jax.tree.leaves(rows)[0])
    size, results = round_up(few_sizes(count, batch_size)), []
    for start in range(0, count, size):
        index = np.resize(np.arange(start, min(start + size, count)), size)
        result = f(weights, jax.tree.map(lambda x, index=index: put(x[index]), rows))
        results.append(jax.tree.map(lambda x, n=count - start: fetch(x, n), result))
        advance(min(size, count - start))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def fetch(values: jax.Array, count: int) -> np.ndarray:
    """The first `count` rows of a batch on the mesh, or all if it has fewer, on every process."""
    return to_host(values)[:count]
