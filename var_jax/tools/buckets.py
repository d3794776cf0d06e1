"""Buckets of Google Cloud Storage: what is done otherwise there than on a disk.

gcsfs repeats a request that failed in passing (429, 5xx, a reset) for a minute, tensorstore and
array_record do so themselves; `retrying` stands around what must outlast more than that.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

import fsspec
from etils import epath
from fsspec.config import conf

from var_jax import BadInput, Failure
from var_jax.tools import ending

T = TypeVar("T")
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries of `retrying`
LAST_TRY = 90.0  # seconds after the first try no more begins; gcsfs may take a minute for each
LASTING = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ELOOP)
LASTING += (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG)
REFRESHED, DEAD = 20.0, 120.0  # seconds: how often locks are, and after how long without
COPIED = 60.0  # seconds between the copies of a `Mirror`

os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is, epath would take its own way
conf.setdefault("gcs", {})["use_listings_cache"] = False  # it would hide what other hosts write
for name in ("gcsfs", "google.auth"):  # they log what they raise
    logging.getLogger(name).setLevel(logging.CRITICAL)


def filesystem() -> Any:
    """The gcsfs behind epath's gs:// paths. Raises: BadInput if it is not installed."""
    try:
        return fsspec.filesystem("gcs", finalize_on_close=True)
    except ImportError as error:
        sentence = "gs:// folders need one package more: pip install 'var_jax[gcs]'."
        raise BadInput(sentence) from error


def retrying(call: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> T:
    """What `call` returns; an error that may pass is tried again after 1, 2, 4 and 8 seconds.

    No try begins over `LAST_TRY` seconds by `clock` after the first: a bucket that is lost is told
    after that time and one more request at the latest.
    """
    begun = clock()
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not may_pass(error) or clock() + pause > begun + LAST_TRY:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))
    return call()


def may_pass(error: Exception) -> bool:
    """Whether an error of reading or writing is of the network or a server, and not an answer."""
    answers = FileNotFoundError, FileExistsError  # also without a number, as gcsfs raises them
    if isinstance(error, answers) or getattr(error, "errno", 0) in LASTING or refusal(error):
        return False
    known = sys.modules.get("gcsfs.retry")
    return isinstance(error, OSError) or bool(known and known.is_retriable(error))


def refusal(error: Exception) -> str:
    """Why a bucket refused, if it did: "" for any other error."""
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return "these credentials have no permission"
    unknown = type(error).__module__.startswith("google.auth")
    if unknown or getattr(error, "code", None) in (401, "401"):
        return "there are no valid credentials; expected `gcloud auth application-default login`"
    return ""


@contextlib.contextmanager
def reading(address: str | PurePath, missing: str) -> Iterator[None]:
    """Says what is wrong where a bucket does not give what is asked for.

    Raises: BadInput if there is no such thing (`missing`) or it may not be read; Failure if the
        bucket cannot be reached.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"{address}: {missing}.") from error
    except Exception as error:
        if why := refusal(error):
            raise BadInput(f"{address} cannot be read: {why}.") from error
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise Failure(f"{address} cannot be reached: {why}.") from error


def read_object(path: PurePath) -> bytes:
    """An object, by one request, where epath takes three."""
    return filesystem().cat_file(str(path))


def generation(path: PurePath) -> str:
    """What tells an object from those that lay at its place before. Raises: as `reading`."""
    with reading(path, "there is no such object"):
        about = retrying(lambda: filesystem().info(str(path)))
        if about["type"] != "file":
            raise FileNotFoundError(path)
        return about["generation"]


def download(path: PurePath, local: PurePath) -> None:
    """Writes an object to a local file. Raises: as `reading`."""
    with reading(path, "there is no such object"):
        retrying(lambda: filesystem().get_file(str(path), str(local)))


def upload(local: PurePath, path: PurePath) -> None:
    """Writes a local file to a bucket, where it appears whole."""
    retrying(lambda: filesystem().put_file(str(local), str(path)))


def check_buckets(words: Iterable[str]) -> None:
    """Looks at each bucket that the words of a command name.

    Raises: BadInput if it is not there or may not be listed, or gcsfs reads a name as a pattern;
        Failure if it cannot be reached.
    """
    for address in (found for word in words for found in re.findall("(?i)gs://[^/,].*", word)):
        if wrong := re.search(r"[*?#[\]]", address):
            raise BadInput(f"{address} holds {wrong[0]!r}, which means something else in a bucket.")
        check_bucket(re.split("[/,]", address)[2])


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raises BadInput unless there is such a bucket, and may be listed; Failure without network."""
    system = filesystem()
    with reading(f"gs://{bucket}", "there is no such bucket"):
        system.call("GET", "b/{}/o", bucket, maxResults=1)


def checksums(folder: PurePath) -> dict[str, list]:
    """[bytes, CRC-32C in base64] of each object below a folder, by one listing."""
    root = str(folder).removeprefix("gs://") + "/"
    found = filesystem().find(root, detail=True)
    return {n.removeprefix(root): [about["size"], about["crc32c"]] for n, about in found.items()}


def lock_object(path: PurePath) -> Callable[[], None] | None:
    """Locks by an object that this process refreshes; returns what gives it back.

    None if another process has it. One that did not refresh it for two minutes is dead, and so is
    one of this machine that has ended.

    Raises: BadInput if nothing may be written there.
    """
    lock = _Lock(str(path))
    try:
        ours = lock.acquire()
    except Exception as error:
        if why := refusal(error):
            raise BadInput(f"{path.parent} cannot be written: {why}.") from error
        raise
    if not ours:
        return None
    threading.Thread(target=lock.keep, daemon=True).start()
    return lock.release


class _Lock:
    """An object that is only written over what the writer knows it to be."""

    def __init__(self, path: str):
        self._path = path
        self._place = path.removeprefix("gs://").split("/", 1)  # bucket and key
        about = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        self._text = json.dumps(about | {"since": time.time_ns()}).encode()
        self._generation, self._busy, self._released = "0", threading.Lock(), threading.Event()

    def acquire(self) -> bool:
        """Takes the lock if it is free or a dead process has it, which may take two minutes."""
        if self._write("0"):
            return True
        seen, end = self._read(), time.monotonic() + DEAD
        if seen[1] and not _has_ended(seen[1]):
            owner = seen[1].decode(errors="replace")
            print(f"{self._path} is held by {owner}; waiting for a sign of life", file=sys.stderr)
            while time.monotonic() < end and seen[1]:
                time.sleep(REFRESHED / 4)
                if (now := self._read()) != seen and now[1]:
                    return False
                seen = now
        return self._write(seen[0])

    def keep(self) -> None:
        """Refreshes the lock until it is given back; ends the process that has lost it."""
        while not self._released.wait(REFRESHED):
            with contextlib.suppress(Exception), self._busy:  # out of reach: the next time may do
                if self._released.is_set() or self._write(self._generation) or self._write("0"):
                    continue
                # Before it writes there again, or another host of its run does.
                ending.end(1, f"error: another process has taken {self._path}")

    def release(self) -> None:
        """Gives the lock back."""
        with contextlib.suppress(Exception), self._busy:  # what stays will seem dead
            self._released.set()
            found, text = self._read()
            if text == self._text:
                system = filesystem()
                system.call("DELETE", "b/{}/o/{}", *self._place, ifGenerationMatch=found)

    def _write(self, generation: str) -> bool:
        """Writes if the object is of this generation; "0" stands for none."""
        system = filesystem()
        address = system.base.replace("/storage/", "/upload/storage/") + "b/{}/o"
        bucket, name = self._place
        options = {"uploadType": "media", "name": name, "ifGenerationMatch": generation}
        try:
            answer = system.call("POST", address, bucket, data=self._text, json_out=True, **options)
        except FileExistsError:  # of another generation, or ours: an answer got lost
            self._generation, text = self._read()
            return text == self._text
        self._generation = answer["generation"]
        return True

    def _read(self) -> tuple[str, bytes]:
        """The generation and the owner; "0" and nothing if there is no lock."""
        try:
            headers, text = filesystem().call("GET", "b/{}/o/{}", *self._place, alt="media")
        except FileNotFoundError:
            return "0", b""
        return headers["x-goog-generation"], text


def _machine() -> str:
    """Tells machines, their boots and containers apart; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _has_ended(text: bytes) -> bool:
    """Whether the owner of a lock ran on this machine and runs no longer."""
    try:
        owner = json.loads(text)
        if owner["machine"] and owner["machine"] == _machine():
            os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        pass
    return False


class Mirror:
    """A local folder whose files a thread copies to a bucket, where nothing can be appended to.

    It begins with the files called `names` that are there. What could not be copied is told, and
    copied the next time.
    """

    def __init__(self, remote: epath.Path, names: Sequence[str]):
        self._folder = tempfile.TemporaryDirectory(prefix="var_jax")  # removed with this object
        self.local, self._remote = epath.Path(self._folder.name), remote
        self._copied: dict[epath.Path, tuple[int, int]] = {}  # size and time of what is there
        self._lock, self._timer = threading.Lock(), threading.Timer(0, self.copy)
        self._waits = False  # whether the timer's copy is still to begin
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.local / name).write_bytes(retrying((remote / name).read_bytes))

    def schedule(self) -> None:
        """Copies within a minute, on a thread."""
        if not self._waits:
            self._timer = threading.Timer(COPIED, self.copy)
            self._timer.daemon = self._waits = True
            self._timer.start()

    def copy(self) -> None:
        """Copies what has changed; an error ends nothing."""
        self._timer.cancel()
        self._waits = False  # ahead of reading: what is written from now on is copied anew
        try:
            with self._lock:
                for folder, _, names in os.walk(self.local):
                    for path in (Path(folder) / name for name in names):
                        self._upload(path, self._remote / path.relative_to(self.local))
        except Exception as error:
            text = f"warning: {self._remote}: metrics were not copied, will be later ({error})\n"
            sys.stderr.write(text)

    def _upload(self, path: Path, target: epath.Path) -> None:
        state = path.stat().st_size, path.stat().st_mtime_ns
        if self._copied.get(target) != state:
            data = path.read_bytes()  # a file that grows meanwhile would be refused
            retrying(lambda: filesystem().pipe_file(str(target), data))
            self._copied[target] = state
