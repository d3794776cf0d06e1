"""Results over a set of images, kept on disk part by part: a stopped run goes on."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from var_jax.sharding.mesh import of_first
from var_jax.tools.npz import is_whole, save_npz


def in_parts(
    stem: epath.Path,
    parts: Iterable[Any],
    run: Callable[[Any], dict[str, np.ndarray]],
    skip: Callable[[int], object],
) -> tuple[epath.Path, ...]:
    """One .npz for each part of a set, what `run` makes of it; only what is missing or damaged is
    made anew, and for the rest `skip` is called with the number of its rows.

    A part is an array, or a tree of them, whose first axis is that of the rows. Files are called by
    `stem`, the place and the checksum of the part, so that none is taken for another. Process 0
    writes and looks for them; all processes take the same parts.
    """
    paths, start = [], 0
    for part in parts:
        leaves, checksum = jax.tree.leaves(part), 0
        for leaf in leaves:
            checksum = zlib.crc32(leaf.tobytes(), checksum)
        path = stem.with_name(f"{stem.name}-{start:08d}-{checksum:08x}.npz")
        if of_first(lambda path=path: np.array(is_whole(path)), (), bool):
            skip(len(leaves[0]))
        else:
            found = run(part)
            if jax.process_index() == 0:
                save_npz(path, **found)
        paths.append(path)
        start += len(leaves[0])
    return tuple(paths)
