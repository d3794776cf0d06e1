"""Tensors in the `.pth` files of PyTorch before 1.6, read without torch.

Many public weights are such files: FID's Inception, torchvision's, LPIPS's. Pickles stand in a row
(a magic number, a version, facts about the machine, the object, the keys of its storages), then
the storages themselves, each its count in eight bytes and its values.
"""

import dataclasses
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from var_jax.checkpoints.torch.pth import (
    MAX_DESCRIPTION,
    Archive,
    NotWeights,
    Tensor,
    Unpickler,
    is_untyped,
)

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[:-1]


@dataclasses.dataclass
class Storage:
    """Values that lie in the file; `start` is known after its last pickle."""

    count: int
    itemsize: int
    start: int = -1

    @property
    def file_size(self) -> int:
        return self.count * self.itemsize


class LegacyFile(Archive):
    """A file that serves its tensors as `Archive` does."""

    def __init__(self, path: Path):
        self.path, self.storages = path, {}

    def read(self, entry: Storage) -> bytes:  # type: ignore[override]
        """The values of a storage."""
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.file_size)

    def unpickle(self) -> Any:
        """The object that was saved: containers, numbers, text and tensors."""
        with self.path.open("rb") as file:
            pickles = io.BytesIO(file.read(MAX_DESCRIPTION))
        with self.unpickling():
            *_, machine, state, keys = (LegacyUnpickler(self, pickles).load() for _ in range(5))
            if not machine["little_endian"]:
                raise self.big_endian()
            self.locate(keys, pickles.tell())
        return state

    def locate(self, keys: list[str], position: int) -> None:
        """Finds the storages, which lie in the order of `keys`.

        Raises: BadInput if one does not.
        """
        with self.path.open("rb") as file:
            for key in keys:
                storage = self.storages.pop(key)
                file.seek(position)
                (count,) = struct.unpack("<q", file.read(8))
                storage.start = position + 8
                position = storage.start + storage.file_size
                if count != storage.count or position > self.path.stat().st_size:
                    raise self.damaged(f"it does not hold the {storage.count} values of {key!r}")
        if self.storages:
            raise self.damaged(f"its storage {min(self.storages)!r} is missing")


class LegacyUnpickler(Unpickler):
    """`Unpickler` for storages that are found later."""

    archive: LegacyFile

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a pickle refers to, as the tensor of its first value."""
        tag, dtype, key, _, count, view = pid
        if is_untyped(tag, dtype):
            return dtype
        if tag != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or view:
            raise NotWeights("a persistent object")
        if type(count) is not int or count < 0:
            raise self.archive.damaged(f"its storage {key!r} has {count} values")
        found = self.archive.storages.setdefault(key, Storage(count, dtype.itemsize))
        return Tensor(self.archive, found, dtype)
