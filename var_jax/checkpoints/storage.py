"""What training checkpoints and exports share: flat trees on Orbax, and a record of their files.

Both store a pytree as a flat `{"path/of/leaf": array}`, so the files depend on no class, and both
work on local and `gs://` directories and from any mesh to any other.
"""

import base64
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from var_jax import BadInput
from var_jax.tools.buckets import checksums
from var_jax.tools.files import check_separators, in_bucket, replacing
from var_jax.tools.paths import is_pipe, user_path
from var_jax.tools.trees import flatten

RECORD = "files.json"
COMMITTED = "commit_success.txt"  # that Orbax writes last in a bucket
MAX_CHECKSUMMED = 2**32  # bytes of a checkpoint; larger ones would take seconds to read twice


def resolve(directory: str | PurePath) -> epath.Path:
    """The absolute path of a local directory, or the address of a bucket."""
    path = user_path(directory)
    check_separators(path)
    # Orbax wants local paths absolute; as the system sees them, where links and .. come together.
    return path if in_bucket(path) else epath.Path(os.path.realpath(path))


def context(before_commit: Callable[[], None] | None = None) -> ocp.Context:
    """How Orbax saves and loads here; `before_commit` runs when all is written but not visible."""
    context = ocp.Context()
    # Orbax calls it "post finalization"; the rename that makes a checkpoint visible comes after it.
    context.async_options.post_finalization_callback = before_commit
    context.array.saving.enable_write_sharding_file = False  # The caller always says where to.
    registry = ocp.handlers.local_registry()
    # Without this a dict of numbers is taken for a pytree, and stored as arrays.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    context.checkpointables.registry = registry
    return context


def with_shardings(abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """`flatten` of abstract leaves, on the first device where they have no sharding."""
    anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or anywhere)
        for name, x in flatten(abstract).items()
    }


def compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str, *, dtypes: bool):
    """Compares names, shapes and kinds of tensors, or also their exact dtypes.

    Raises: BadInput on the first tensor that is not in both, or differs.
    """
    for name, want in wanted.items():
        have, reason = saved.get(name), ""
        floats = have and all(jnp.issubdtype(x.dtype, jnp.floating) for x in (have, want))
        if have is None:
            reason = f"has no tensor {name!r}; expected one of shape {want.shape} for this config"
        elif have.shape != want.shape:
            shapes = f"{have.shape}; expected {want.shape}"
            reason = f"holds {name!r} with shape {shapes} for this config"
        elif have.dtype != want.dtype and (dtypes or not floats):
            reason = f"holds {name!r} as {have.dtype}; expected {want.dtype}"
        if reason:
            raise BadInput(f"{where} {reason}.")
    for name in (name for name in saved if name not in wanted):
        raise BadInput(
            f"{where} holds a tensor {name!r} of shape {saved[name].shape}; expected no such "
            "tensor for this config."
        )


def is_checkpoint(path: epath.Path) -> bool:
    """Whether a folder is that of a step, written to its end: in a bucket a file says so."""
    return path.name.isdecimal() and (not in_bucket(path) or (path / COMMITTED).exists())


def record_files(directory: epath.Path) -> None:
    """Records size and checksum of every file in `directory`/files.json, for `damage`.

    The checksum is a CRC-32, or in a bucket the CRC-32C that its listing has.
    """
    if in_bucket(directory):
        record = checksums(directory)
    else:
        paths = {str(path.relative_to(directory)): path for path in _files(directory)}
        sizes = {name: path.stat().length for name, path in paths.items()}
        read = sum(sizes.values()) <= MAX_CHECKSUMMED
        record = {n: [sizes[n], _crc32(path) if read else None] for n, path in paths.items()}
    record.pop("_CHECKPOINT_METADATA", None)  # Orbax rewrites it later, and does without it.
    (directory / RECORD).write_text(json.dumps(record))


def seal(directory: epath.Path) -> None:
    """Adds to the record what Orbax writes last, on local disks."""
    if not in_bucket(directory):
        record = json.loads((directory / RECORD).read_text())
        for path in _files(directory):
            if (name := str(path.relative_to(directory))) not in {*record, RECORD}:
                record[name] = [path.stat().length, _crc32(path)]
        with replacing(directory / RECORD) as beside:
            beside.write_text(json.dumps(record))


def damage(directory: epath.Path) -> str:
    """Which file is missing or has other bytes than it was written with; "" if none.

    Orbax notices files that are missing or cut short, after many tracebacks of its own, but no
    changed bytes of an array.
    """
    path = directory / RECORD
    try:
        files = () if in_bucket(directory) else _files(directory)
        if pipe := next(filter(is_pipe, files), None):
            return f"{pipe.name} is no file"
        recorded = path.exists()
        if not recorded:
            if next(_files(directory), None) is None:
                return "it holds no files"
            print(f"{path} is missing: no damage to the checkpoint can be seen", file=sys.stderr)
        record = json.loads(path.read_text()) if recorded else {}
        objects = checksums(directory) if record and in_bucket(directory) else {}
        for name, (size, crc) in record.items():
            path = directory / name
            if name not in objects and not path.exists():
                return f"{name} is missing"
            found = objects[name][0] if name in objects else path.stat().length
            if found != size:
                return f"{name} has {found} bytes; expected {size}"
            kept = objects[name][1] if name in objects and isinstance(crc, str) else ""
            if crc is not None and (kept or _checksum(path, crc)) != crc:
                return f"{name} fails its checksum"
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"{path.name} cannot be read ({type(error).__name__})"
    return ""


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        yield from _files(path) if path.is_dir() else (path,)


def _crc32(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return crc


def _checksum(path: epath.Path, like: int | str) -> int | str:
    """The checksum of a file, of the kind of another: CRC-32, or CRC-32C from a bucket."""
    if isinstance(like, int):
        return _crc32(path)
    try:
        import google_crc32c  # pyright: ignore[reportMissingImports]  # of the extra [gcs]
    except ImportError:
        return like
    with path.open("rb") as file:
        parts = google_crc32c.Checksum()
        while part := file.read(2**24):
            parts.update(part)
    return base64.b64encode(parts.digest()).decode()


def reason(error: Exception) -> str:
    """The error as part of a sentence: its root's first line, cut where it gets long."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:160] + '…'}"
