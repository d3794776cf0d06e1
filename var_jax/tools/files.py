"""Files that are whole or not there, and locks."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from etils import epath

from var_jax import BadInput
from var_jax.tools.buckets import download, generation, lock_object, upload
from var_jax.tools.paths import user_path

OF_FILES = (".npz", ".npy", ".png", ".jpg", ".pth", ".pt", ".safetensors", ".json")
DISK_FULL = "No space left on device|Disk quota exceeded"
MAX_JSON = 2**26  # bytes
PATIENCE = 90.0  # seconds: network file systems keep the names in a folder for up to a minute
_held: dict[str, Callable[[], None]] = {}  # how each lock of this process is given back


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
        with naming_full_disk(path):
            yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming_full_disk(path: str | PurePath) -> Iterator[None]:
    """Names what is written where a library or the system says only that the disk is full."""
    try:
        yield
    except Exception as error:
        text = "".join(traceback.format_exception(error, limit=0))
        if re.search(DISK_FULL, text) and not getattr(error, "filename", None):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def file_names(folder: epath.Path) -> set[str]:
    """The names of the files in a folder; a pipe, which might never answer, is none."""
    if in_bucket(folder):
        return {path.name for path in folder.iterdir()}
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object. Raises: BadInput if the file holds something else."""
    try:
        if (size := path.stat().length) > MAX_JSON:
            raise ValueError(f"at most {MAX_JSON} bytes, not {size}")
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: expected JSON ({error}).") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def in_bucket(path: str | PurePath) -> bool:
    """Returns whether a path is an address such as gs://..."""
    return "://" in str(path)


def local_path(text: str | PurePath, name: str = "") -> Path:
    """`user_path`, of what is read or written in pieces. Raises: BadInput for one in a bucket."""
    path = user_path(text, name)
    if in_bucket(path):
        where = f"{name}={path}" if name else path
        raise BadInput(f"{where} is in a bucket; files of this kind must be on a local disk.")
    return Path(path)


def cache_folder() -> Path:
    """The folder of what would otherwise be fetched or compiled again: ~/.cache/var_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "var_jax"


def local_copy(text: str | PurePath) -> Path:
    """`user_path`, of a file that is read in pieces: of one in a bucket a copy in the cache.

    It is made once, and again when the object changes. Raises: as `buckets.reading`.
    """
    path = user_path(text)
    if not in_bucket(path):
        return Path(path)
    version = hashlib.sha256(f"{path}#{generation(path)}".encode()).hexdigest()[:16]
    copy = cache_folder() / "files" / version / path.name
    if not copy.exists():
        print(f"copying {path} into {copy.parent}", file=sys.stderr)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: other processes may be copying it, too.
        with naming_full_disk(copy), tempfile.TemporaryDirectory(dir=copy.parent) as folder:
            download(path, beside := Path(folder) / path.name)
            beside.replace(copy)
    return copy


def output_path(text: str | PurePath, name: str = "--out") -> epath.Path:
    """The folder that the flag `name` gives to write to.

    Raises: BadInput if it is a file, or no checkpoint can be written there.
    """
    folder = user_path(text, name)
    if in_bucket(folder):
        return folder
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise BadInput(f"{name}={folder}: {place} is a file; expected a folder to write to.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BadInput(f"{name}={folder} cannot be written: no permission to write in {place}.")
    if folder.suffix.lower() in OF_FILES and not folder.exists():
        raise BadInput(f"{name}={folder} has the name of a file; expected a folder to write to.")
    check_separators(folder)
    return folder


def check_separators(path: PurePath) -> None:
    """Raises BadInput for a local path with a backslash, which tensorstore takes for a slash."""
    if os.name != "nt" and not in_bucket(path) and "\\" in os.path.realpath(path):
        raise BadInput(f"{path} has a backslash in it, where no checkpoint can be written.")


def output_folder(text: str | PurePath, name: str = "--out", *, locks: bool = True) -> epath.Path:
    """`output_path`, locked for this command, unless another process does, and made if it is new.

    Raises: BadInput also if another command is at work in it.
    """
    folder = output_path(text, name)
    if locks and not acquire_lock(folder / ".lock"):
        raise BadInput(
            f"another command is at work in {folder}; name another {name} (or, if its machine is"
            " gone, remove .lock there)."
        )
    return folder


def acquire_lock(path: str | PurePath) -> bool:
    """Locks the file `path`, until `release_locks` or the end of this process, however it comes.

    False if another process has it. Where there are no locks, as on Windows, the answer is True.
    """
    path = epath.Path(path if in_bucket(path) else os.path.realpath(path))
    if str(path) in _held:
        return True
    release = lock_object(path) if in_bucket(path) else _lock_file(path)
    if release:
        _held[str(path)] = release
    return release is not None


def _lock_file(path: epath.Path) -> Callable[[], None] | None:
    """Locks a local file; returns what gives it back, or None if another process has it."""
    created = not path.parent.exists()
    for _ in range(9):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(file)
            return None
        except (ImportError, OSError):  # a system or a file system without locks
            pass
        if _is_at(path, file):
            return functools.partial(_release, path, file, created)
        os.close(file)  # removed by its owner ahead of our lock: others lock the file that is there
    return None


def release_locks() -> None:
    """Gives back the locks of this process, at the end of a command."""
    while _held:
        _held.popitem()[1]()


def _is_at(path: epath.Path, file: int) -> bool:
    """Whether an open file is the one that lies at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _release(path: epath.Path, file: int, created: bool) -> None:
    with contextlib.suppress(OSError):
        if _is_at(path, file):  # else the folder was replaced
            os.unlink(path)
        if created:
            os.rmdir(path.parent)  # where nothing was written: a refusal leaves no folder
    os.close(file)
