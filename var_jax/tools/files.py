"""Files that are whole or not there, or that one process holds."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import PurePath

from etils import epath


@contextlib.contextmanager
def replacing(path: str | PurePath) -> Iterator[epath.Path]:
    """A path beside `path` to write to: renamed into its place at the end, gone after an error."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.partial"
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)
        raise


def held(path: str | PurePath) -> bool:
    """Holds the file `path` until this process ends, however; False if another one holds it.

    Where there are no locks, as in a bucket, nothing is held and the answer is True.
    """
    if "://" in str(path):
        return True
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)  # stays open: closing it would let go
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True
