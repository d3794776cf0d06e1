"""Files that are whole or not there, and locks."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from etils import epath

from var_jax import BadInput
from var_jax.tools.buckets import acquire_lock as lock_in_bucket
from var_jax.tools.buckets import upload


@contextlib.contextmanager
def replacing(path: str | PurePath) -> Iterator[epath.Path]:
    """A local path to write to: moved to `path` at the end, gone after an error."""
    path = epath.Path(path)
    if in_bucket(path):  # where an object appears whole, and renaming takes many requests
        with tempfile.TemporaryDirectory(prefix="var_jax") as folder:
            beside = epath.Path(folder) / path.name
            yield beside
            upload(beside, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.partial"
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)
        raise


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object. Raises: BadInput if the file holds something else."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} cannot be read: expected JSON ({error}).") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def in_bucket(path: str | PurePath) -> bool:
    """Returns whether a path is an address such as gs://..."""
    return "://" in str(path)


def acquire_lock(path: str | PurePath) -> bool:
    """Locks the file `path` until this process ends, however; False if another process has it.

    Where there are no locks, as on Windows, the answer is True.
    """
    if in_bucket(path):
        return lock_in_bucket(epath.Path(path)) is not None
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)  # closing it would release the lock
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):  # a system or a file system without locks
        pass
    return True
