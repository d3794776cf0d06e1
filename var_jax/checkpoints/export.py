"""The export, or inference checkpoint: what training leaves and every command loads.

A folder with `config.json`, which says all that is needed to build the models, and `weights/`.
`sampling/exports.py` builds them. "emoji" names the export that ships in the package.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import zlib
from collections.abc import Mapping
from importlib import resources
from itertools import islice
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from var_jax import BadInput
from var_jax.checkpoints import hub, storage
from var_jax.tools.files import naming_full_disk, read_json
from var_jax.tools.trees import flatten, path_name

PyTree = Any
MAX_SEARCHED = 1000  # entries of a folder that is no export
# What the weights are of; what else config.json says is the user's to change.
NETWORKS = ("tokenizer", "transformer", "torch_buffers", "fingerprints")
MAX_COMPRESSED = 2**26  # bytes; smaller exports are compressed, because they travel


def save_export(directory: str | PurePath, parts: Mapping[str, PyTree], config: dict) -> None:
    """Writes `directory`/{config.json, weights/}, in place of an older export.

    Arrays are stored in the dtype they have; `config` is JSON, and the fingerprints of all `parts`
    that have a `config` join it. The older export is moved aside (to .NAME.old) once the new one is
    whole, and deleted when that has its place.

    Raises:
        BadInput: `directory` is a file, or holds other files, which replacing it would delete.
    """
    target = storage.resolve(directory)
    beside, old = (target.parent / f".{target.name}.{end}" for end in ("partial", "old"))
    check_replaceable(target)
    models = {name: part for name, part in parts.items() if hasattr(part, "config")}
    config = config | {"fingerprints": {name: fingerprint(part) for name, part in models.items()}}
    if jax.process_index() == 0:
        beside.rmtree(missing_ok=True)
        beside.mkdir(parents=True)
    multihost_utils.sync_global_devices("export begins")
    context = storage.context()
    context.memory.deepcopy_host_arrays = False  # Nothing changes them meanwhile.
    # 8 to 22 % smaller, ten times slower, twice the memory.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
    context.array.saving.use_compression = size < MAX_COMPRESSED
    with context, naming_full_disk(target):
        ocp.save(beside / "weights", flatten(parts))
    if jax.process_index() == 0:
        storage.record_files(beside / "weights")
        storage.seal(beside / "weights")
        config = json.loads(json.dumps(config))
        text = json.dumps(config | {"checksums": checksums(config)}, indent=2) + "\n"
        (beside / "config.json").write_text(text)
        old.rmtree(missing_ok=True)
        if target.exists():
            target.rename(old)
        beside.rename(target)
        old.rmtree(missing_ok=True)
    multihost_utils.sync_global_devices("export ends")


def check_replaceable(target: epath.Path) -> None:
    """Raises BadInput unless `target` is new, or a folder of nothing but an export."""
    if target.exists() and not target.is_dir():
        raise BadInput(f"{target} is a file; expected a directory to write a checkpoint to.")
    others = {path.name for path in target.iterdir()} if target.exists() else set()
    if others := sorted(others - {"config.json", "weights", ".lock"}):
        raise BadInput(
            f"{target} holds {others[0]!r}; expected a new directory or one that holds only a "
            "checkpoint (config.json and weights)."
        )


def find_export(directory: str | PurePath) -> epath.Path:
    """The folder of an export, given by its path, or by name: in the package or from the hub."""
    if hub.is_name(directory):
        return hub.folder(directory)
    bundled = epath.Path(str(resources.files("var_jax") / "assets" / str(directory)))
    if "/" not in str(directory) and is_export(bundled) and not is_export(epath.Path(directory)):
        return bundled
    return storage.resolve(directory)


def export_config(directory: str | PurePath) -> dict:
    """The config inside an export; tells on stderr what is not as it was written.

    Raises: BadInput if `directory` is no export, or what config.json says of the networks is not as
        it was written, or unreadable.
    """
    folder = find_export(directory)
    if not is_export(folder):
        raise BadInput(f"{folder} is not a checkpoint: {what_else(folder)}.")
    path = folder / "config.json"
    config = read_json(path)
    found = checksums({name: value for name, value in config.items() if name != "checksums"})
    recorded = config.pop("checksums", found)  # older exports have none
    recorded = recorded if isinstance(recorded, dict) else {}
    changed = sorted(n for n in {*found, *recorded} if found.get(n) != recorded.get(n))
    if networks := [name for name in changed if name in NETWORKS]:
        raise BadInput(
            f"{path}: {', '.join(networks)} is not as it was written with the weights; set it back,"
            " or remove 'checksums' there if it was changed on purpose."
        )
    if changed:
        warn(f"{path}: {', '.join(changed)} is not as it was written: edited, or damaged")
    return config


def checksums(config: dict[str, Any]) -> dict[str, int]:
    """The CRC-32 of each section of a config.json."""
    text = {name: json.dumps(value, sort_keys=True) for name, value in config.items()}
    return {name: zlib.crc32(value.encode()) for name, value in text.items()}


@functools.cache
def warn(sentence: str) -> None:
    """Warns on stderr, once however often a file is read."""
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def is_export(folder: epath.Path) -> bool:
    """Whether a folder looks like an export."""
    return (folder / "weights").exists() and (folder / "config.json").exists()


def what_else(folder: epath.Path) -> str:
    """What lies in the place of an export, and what to do."""
    inside = folder / "checkpoint"
    expected = "expected a directory with config.json and weights"
    if not folder.exists():
        return f'it does not exist; {expected}, or a name: "emoji", "hub:d16"'
    if not folder.is_dir():
        if folder.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin", ".safetensors"):
            command = f"python -m var_jax.convert --tokenizer {folder} --out DIR"
            return f"it is a file of PyTorch, which `{command}` makes one of"
        return f"it is a file; {expected}"
    if is_export(inside):
        return f"it is a work directory; its checkpoint is {inside}"
    for workdir in (folder, folder.parent, folder.parent.parent):
        if (workdir / "metrics.jsonl").exists():
            where = f"{workdir} is the work directory of a run"
            if is_export(workdir / "checkpoint"):
                return f"{where}, whose checkpoint is {workdir / 'checkpoint'}"
            return f"{where} that has not ended; the command that began it goes on and leaves one"
    within = sorted(p.name for p in islice(folder.iterdir(), MAX_SEARCHED) if is_export(p))
    if within:
        return f"it holds checkpoints: {', '.join(within[:8])}; name one of them"
    missing = "weights" if (folder / "config.json").exists() else "config.json"
    return f"it has no {missing}; {expected}"


def load_weights(directory: str | PurePath, abstract: PyTree, *, as_stored: bool = False) -> PyTree:
    """The weights as `abstract` (`jax.ShapeDtypeStruct`s): its structure, shardings and dtypes.

    Or `as_stored`: in the dtypes of the file, as NumPy arrays. What lies in the export under other
    top-level names than `abstract` has is left there.

    Raises: BadInput if `directory` is no export, its weights are damaged, or a tensor's name, shape
        or kind (float, integer) differs.
    """
    export_config(directory)
    path, wanted = find_export(directory) / "weights", storage.with_shardings(abstract)
    if reason := storage.damage(path):
        raise BadInput(f"{path} is damaged: {reason}.")
    parts = {name.split("/")[0] for name in wanted}
    context = storage.context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            saved = ocp.metadata(path).metadata
            saved = {name: x for name, x in saved.items() if name.split("/")[0] in parts}
            storage.compare(saved, wanted, str(path), dtypes=False)
            on_host = {name: np.empty(0, saved[name].dtype) for name in wanted}
            flat = ocp.load(path, on_host if as_stored else wanted)
    except (BadInput, MemoryError, jax.errors.JaxRuntimeError):  # of a device: its memory
        raise
    except Exception as error:  # Orbax and tensorstore have no common error for damage.
        why = storage.reason(error)
        raise BadInput(f"{path} cannot be read ({why}); expected undamaged weights.") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [flat[name] for name in wanted])


def load_fingerprint(directory: str | PurePath, part: str, model: Any) -> str:
    """The `fingerprint` of a part that was loaded from an export, read if the export holds it."""
    return export_config(directory).get("fingerprints", {}).get(part) or fingerprint(model)


def fingerprint(model: Any) -> str:
    """16 hex digits that tell a model's config and weights (as float32) from any other's."""
    # Fields at their default are left out, so that a new one changes no fingerprint.
    config = {
        field.name: value
        for field in dataclasses.fields(model.config)
        if (value := getattr(model.config, field.name)) != field.default
    }
    return weights_digest(model, json.dumps(config, sort_keys=True))


def weights_digest(model: Any, config: str = "") -> str:
    """16 hex digits that tell weights (as float32), and a text beside them, from any others."""
    digest = hashlib.sha256(config.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(leaf, np.float32 if floats else None).data)
    return digest.hexdigest()[:16]
