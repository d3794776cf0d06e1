"""array_record files: shards of bytes with random access, and the manifest beside them.

A folder is finished once it has manifest.json; until then unfinished.json holds the same, so that a
stopped command goes on and one with other settings is refused.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from var_jax import BadInput, Failure
from var_jax.tools.buckets import upload
from var_jax.tools.files import PATIENCE, file_names, in_bucket, naming_full_disk, read_json
from var_jax.tools.logs import progress

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"


@dataclasses.dataclass(frozen=True)
class Records:
    """`count` records in shards of `shard_size`; like a sequence of bytes, readers opened late."""

    folder: str
    split: str
    count: int
    shard_size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._source[index]
        except RuntimeError as error:
            path = self.path(index // self.shard_size)
            if "last message" in str(error):  # what a bucket's server said, not what a file holds
                self.__dict__.pop("_source", None)  # it would repeat the error for ever
                raise OSError(f"{path} cannot be read: {error}") from error
            if "Too many open files" in str(error):
                text = f"{self.folder} has {self.shards} shards, each an open file"
                raise BadInput(f"{text}: more than `ulimit -n` allows; raise it.") from error
            raise BadInput(
                f"{path} is damaged ({error}); remove it and give the command again that wrote"
                f" {self.folder} (var_jax.prepare or var_jax.encode)."
            ) from error

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def path(self, shard: int) -> epath.Path:
        """Where a shard lies."""
        name = f"{self.split}-{shard:05d}-of-{self.shards:05d}.array_record"
        return epath.Path(self.folder) / name

    def rows(self, shard: int) -> range:
        """The records of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    def missing(self) -> Iterator[int]:
        """Shards not written yet, one at a time: a damaged manifest may claim 10^12."""
        have = file_names(epath.Path(self.folder))
        return (i for i in range(self.shards) if self.path(i).name not in have)

    def check_complete(self) -> None:
        """Raises BadInput if a shard is not there."""
        for shard in self.missing():
            raise BadInput(f"{self.path(shard)} is missing: {self.folder} is incomplete.")

    @functools.cached_property
    def _source(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        allow_open_files(self.shards)
        # With these it need not open every file at the start.
        spans = [f"{self.path(i)}[0:{len(self.rows(i))}]" for i in range(self.shards)]
        return ArrayRecordDataSource(spans)

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def allow_open_files(more: int) -> None:
    """Raises this process's limit of open files, where it may, so that so many more can be."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < more + 256:
            wanted = more + 256 if hard == resource.RLIM_INFINITY else min(more + 256, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def sound(path: epath.Path, advice: str) -> Iterator[None]:
    """Raises BadInput where a JSON file is none, lacks a field, or has one of another kind.

    `advice` says how to mend it.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        what = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path} is damaged ({what}); {advice}.") from error


def shard_size(count: int) -> int:
    """Records a shard: 256 shards, where that is neither tiny files nor too many for one process.

    A stopped command loses at most the shard it was writing.
    """
    return min(max(-(-count // 256), 256), 16384)


def write_shard(path: epath.Path, records: Iterable[bytes]) -> None:
    """Writes one shard: beside, then renamed; into a bucket from a temporary file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    remote = in_bucket(path)
    folder = tempfile.gettempdir() if remote else os.fspath(path.parent)
    beside = epath.Path(folder) / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with naming_full_disk(beside):
            writer = ArrayRecordWriter(str(beside), "group_size:1")  # one record is read at a time
            for record in records:
                writer.write(record)
            writer.close()
        if remote:
            upload(beside, path)
        elif beside.exists() or not path.exists():  # else an equal command was first, and tidied up
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def images_checksum(count: int, read: Callable[[int], tuple]) -> str:
    """8 hex digits that tell `count` images from others, of 64 that are spread evenly.

    `read` maps an index to (bytes, label, ...).
    """
    value = 0
    for index in np.linspace(0, count - 1, min(64, count)).astype(int):
        try:
            data, label, *_ = read(int(index))
        except OSError:
            continue  # an image that cannot be read
        value = zlib.crc32(data + str(int(label)).encode(), value)
    return f"{value:08x}"


def write_missing(
    folder: epath.Path,
    manifest: dict[str, Any],
    splits: Sequence[Records],
    make: Callable[[str, range, Any], Iterable[bytes]],
    description: str,
    host: int = 0,
    hosts: int = 1,
) -> None:
    """Writes the shards that are not there yet, then the manifest; a stopped command goes on.

    `make` gives the records of a split's rows and updates a progress bar. Each of several hosts
    writes its share of the shards, and then what others have not come to, from their end: hosts
    may come late, be slow or be gone.

    Raises: BadInput if `folder` holds something else; Failure if host 0 does not begin in it.
    """
    if host:
        wait_for_begin(folder)
    begin(folder, manifest)

    def turn(shard: tuple[Records, int]) -> tuple[int, int]:
        distance = (shard[1] - host) % hosts  # 0: its own
        return distance, -shard[1] if distance else shard[1]

    todo = sorted(((part, i) for part in splits for i in part.missing()), key=turn)
    if not todo and (folder / MANIFEST).exists() and not (folder / UNFINISHED).exists():
        return
    with progress(sum(len(part.rows(i)) for part, i in todo), 0, description) as bar:
        for part, i in todo:
            if part.path(i).exists():  # of another host, by now
                bar.update(len(part.rows(i)))
                continue
            try:
                write_shard(part.path(i), make(part.split, part.rows(i), bar))
            except (OSError, RuntimeError):
                if not part.path(i).exists():  # else another host was first, and tidied up
                    raise
    finish(folder, manifest)


def wait_for_begin(folder: epath.Path) -> None:
    """Waits until host 0 has begun `folder`. Raises: Failure if it does not."""
    end = time.monotonic() + PATIENCE
    while not any((folder / name).exists() for name in (MANIFEST, UNFINISHED)):
        if time.monotonic() > end:
            raise Failure(  # not BadInput: process 0 may only be slow to find its images
                f"process 0 has written nothing to {folder} for {PATIENCE:.0f} seconds: either it"
                " has not started, or this is not one folder that all hosts share."
            )
        time.sleep(0.2)


def begin(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Begins or continues `folder` with this manifest.

    Raises: BadInput if it holds something else.
    """
    wanted = json.loads(json.dumps(manifest))
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).exists():
            found = read_json(folder / name)
            for key in wanted:
                if found.get(key) != wanted[key]:
                    raise BadInput(
                        f"{folder} was begun with {key}={short(found.get(key))}, not"
                        f" {short(wanted[key])}; name another folder or remove it."
                    )
            return
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names -= {UNFINISHED}  # another host's, just now
    if any(not name.startswith(".") for name in names):
        raise BadInput(f"{folder} holds other files; name a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / UNFINISHED, wanted)


def finish(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Declares the folder complete, and removes what stopped commands left half-written."""
    _write_json(folder / MANIFEST, manifest)
    (folder / UNFINISHED).unlink(missing_ok=True)
    for path in folder.glob(".*.array_record.*.partial"):  # no manifest of a host that ends too
        path.unlink(missing_ok=True)


def read_manifest(folder: epath.Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished folder of this kind.

    Raises: BadInput if it is unfinished or something else.
    """
    if (folder / UNFINISHED).exists():
        raise BadInput(f"{folder} is unfinished; give the command that writes it again.")
    if not (folder / MANIFEST).exists():
        raise BadInput(f"{folder} has no {MANIFEST}; expected a folder of {kind}.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != kind:
        raise BadInput(f"{folder} holds {manifest.get('kind')}; expected {kind}.")
    return manifest


def _write_json(path: epath.Path, value: dict[str, Any]) -> None:
    beside = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"  # hosts write at once
    try:
        with naming_full_disk(path):
            beside.write_text(json.dumps(value, indent=1) + "\n")
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)
        raise


def short(value: Any) -> str:
    """A value of a manifest as text of at most 61 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"
