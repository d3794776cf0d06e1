"""Tensors in PyTorch's `.pth` files and in `.safetensors` files, read and written without torch.

A `.pth` file is a zip archive: a pickle that describes the tensors, and an uncompressed entry of
bytes for each storage. Unpickling can run any code, so nothing is unpickled here: `_interpret`
follows the few instructions that describe tensors and refuses the rest. A `.safetensors` file is a
JSON header and bytes. Of both, the values stay on disk until NumPy asks for them.
"""

import dataclasses
import functools
import io
import json
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from var_jax import BadInput

MAX_DESCRIPTION = 100 << 20  # bytes of the pickle or JSON header; d36's are under 1 MB
TYPES = (  # by their names in both formats
    ("DoubleStorage", "F64", np.dtype(np.float64)),
    ("FloatStorage", "F32", np.dtype(np.float32)),
    ("HalfStorage", "F16", np.dtype(np.float16)),
    ("BFloat16Storage", "BF16", np.dtype(jnp.bfloat16)),
    ("LongStorage", "I64", np.dtype(np.int64)),
    ("IntStorage", "I32", np.dtype(np.int32)),
    ("ShortStorage", "I16", np.dtype(np.int16)),
    ("CharStorage", "I8", np.dtype(np.int8)),
    ("ByteStorage", "U8", np.dtype(np.uint8)),
    ("BoolStorage", "BOOL", np.dtype(np.bool_)),
)


class Storage(NamedTuple):
    """Bytes in a file, and their checksum where the format keeps one."""

    path: Path
    start: int
    size: int
    crc: int | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file; `np.asarray` maps it into memory."""

    name: str
    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int = 0  # in elements, from the start of the storage

    def __post_init__(self):
        numbers = (*self.shape, *self.strides, self.offset)
        if any(type(n) is not int or n < 0 for n in numbers) or len(self.shape) > 8:
            raise self.wrong(f"has shape {self.shape} and strides {self.strides}")
        reach = self.offset + sum(
            (n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)
        )
        if 0 not in self.shape and (reach + 1) * self.dtype.itemsize > self.storage.size:
            raise self.wrong(f"reaches beyond its {self.storage.size} bytes")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, dtype or self.dtype)
        if not _intact(self.storage):
            raise self.wrong("fails its checksum; download the file again")
        size = self.dtype.itemsize
        start, strides = self.storage.start + self.offset * size, [s * size for s in self.strides]
        mapped = np.memmap(self.storage.path, np.uint8, mode="r")
        array = np.ndarray(self.shape, self.dtype, mapped, start, strides)  # type: ignore[arg-type]
        return array if dtype is None else array.astype(dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def wrong(self, what: str) -> BadInput:
        return BadInput(f"{self.storage.path} is damaged: tensor {self.name!r} {what}.")


@functools.lru_cache
def _intact(storage: Storage) -> bool:
    if storage.crc is None:
        return True
    crc, left = 0, storage.size
    with storage.path.open("rb") as file:
        file.seek(storage.start)
        while left and (part := file.read(min(left, 1 << 24))):
            crc, left = zlib.crc32(part, crc), left - len(part)
    return crc == storage.crc


def open_tensors(path: str | Path, *keys: str) -> dict[str, Tensor]:
    """The tensors of a state dict by name; reads their description alone.

    `keys` lead to it inside a training checkpoint; those that a file does not have are passed over.

    Raises: BadInput if there is no such file, it holds something else, or it is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if head.startswith(b"PK\x03\x04"):
                state = _read_pth(path, file)
            elif head[8:9] == b"{":
                state = _read_safetensors(path, file)
            else:
                raise BadInput(f"{path} {_what(head)}; expected weights as .pth or .safetensors.")
            size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    for key in keys:
        state = state[key] if isinstance(state, dict) and key in state else state
    if not isinstance(state, dict) or not state:
        raise BadInput(f"{path} holds no tensors by name; expected a state dict.")
    tensors = {name: _tensor(path, name, value) for name, value in state.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > 2 * size:  # many views of one storage: a file that would fill the memory
        raise BadInput(f"{path} describes {total} bytes of tensors but has only {size}.")
    return tensors


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of rows that follow each other."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _what(head: bytes) -> str:
    """What a file that holds no weights seems to be, as the verb of a sentence."""
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, such as the error page of a failed download"
    if head.startswith(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"):
        return "has the format of PyTorch before 1.6 (save it again with a newer one)"
    return "is no file of weights, or the start of it is missing"


# --- .pth ---------------------------------------------------------------------------------------


class _View(NamedTuple):
    """What a pickle says about one tensor."""

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any


class _NotWeights(Exception):
    """The pickle holds an instruction that no description of tensors needs."""


def _read_pth(path: Path, file: BinaryIO) -> Any:
    """The object that was saved, with a `_View` for each tensor."""
    archive = _Archive(path, file)
    try:
        if archive.has("byteorder") and archive.content("byteorder") != b"little":
            raise BadInput(f"{path} is of a big-endian machine; only little-endian is read.")
        return _interpret(archive.content("data.pkl"), archive.storage)
    except BadInput:
        raise
    except _NotWeights as error:
        raise BadInput(
            f"{path} holds more than weights ({error}), which could run code; it was not loaded."
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise archive.damaged("the description of its tensors cannot be read") from error


class _Archive:
    """The zip archive around a pickle and the bytes of its tensors."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, file.seek(0, io.SEEK_END)
        try:
            entries = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise self.damaged("its table of contents cannot be read") from error
        self.table = {entry.filename: entry for entry in entries}
        if len(self.table) != len(entries):
            raise self.damaged("two of its entries have the same name")
        roots = [n.removesuffix("data.pkl") for n in self.table if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise BadInput(f"{path} is a zip archive without weights (no data.pkl of torch.save).")
        self.root = roots[0]

    def damaged(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is damaged or cut short: {what}.")

    def has(self, name: str) -> bool:
        return self.root + name in self.table

    def locate(self, name: str) -> Storage:
        """Where the bytes of an entry lie."""
        if not self.has(name):
            raise self.damaged(f"its entry {name!r} is missing")
        entry = self.table[self.root + name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise self.damaged(f"its entry {name!r} is compressed or encrypted; torch's are not")
        self.file.seek(entry.header_offset)
        header = self.file.read(30)  # ends in the lengths of the name and of the padding after it
        start = entry.header_offset + 30 + sum(struct.unpack("<2H", header[26:].ljust(4, b"\0")))
        beyond = header[:4] != b"PK\x03\x04" or start + entry.file_size > self.size
        if beyond or entry.compress_size != entry.file_size:
            raise self.damaged(f"its entry {name!r} reaches beyond the file")
        return Storage(self.path, start, entry.file_size, entry.CRC)

    def content(self, name: str) -> bytes:
        """An entry of moderate size."""
        found = self.locate(name)
        if found.size > MAX_DESCRIPTION:
            raise self.damaged(f"its entry {name!r} has {found.size} bytes")
        self.file.seek(found.start)
        return self.file.read(found.size)

    def storage(self, tag: Any, dtype: Any, key: Any, _device: Any, count: Any) -> tuple:
        """The storage that a pickle refers to, and the type of its numbers."""
        if tag != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise _NotWeights("a persistent object")
        found = self.locate(f"data/{key}")
        if type(count) is not int or found.size != count * dtype.itemsize:
            raise self.damaged(f"its entry 'data/{key}' has {found.size} bytes, not {count} values")
        return found, dtype


def _rebuild(storage: tuple, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    found, dtype = storage
    return _View(found, dtype, offset, shape, strides)


# What a pickle may name: nothing of it is looked up or imported.
_NAMES = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": _rebuild,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
} | {f"torch {name}": dtype for name, _, dtype in TYPES}
_CALLS = tuple(value for value in _NAMES.values() if not isinstance(value, np.dtype))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _interpret(pickled: bytes, storage: Callable[..., tuple]) -> Any:
    """What the instructions of a pickle build, of plain containers, numbers, text and tensors.

    `storage` finds the bytes of a tensor. Raises: _NotWeights for any other instruction, and what
    Python raises where they make no sense.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    def insert(items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # hashing a deep tuple would overflow the C stack
                raise _NotWeights(f"a key of type {type(key).__name__}")
            stack[-1].__setitem__(key, value)

    for instruction, argument, _ in pickletools.genops(pickled):
        match instruction.name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "SHORT_BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" as name:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(take(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(take(-int(name[-1]))))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE" as name:
                memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]  # type: ignore
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])  # type: ignore
            case "SETITEM":
                insert(take(-2))
            case "SETITEMS":
                insert(take(marks.pop()))
            case "APPEND":
                stack[-2].extend(take(-1))
            case "APPENDS":
                items = take(marks.pop())
                stack[-1].extend(items)
            case "GLOBAL" | "STACK_GLOBAL" as name:
                asked = " ".join(take(-2)) if name == "STACK_GLOBAL" else str(argument)
                if asked not in _NAMES:
                    raise _NotWeights(f"it asks for {asked.replace(' ', '.')!r}")
                stack.append(_NAMES[asked])
            case "BINPERSID":
                stack.append(storage(*stack.pop()))
            case "REDUCE":
                call, arguments = take(-2)
                if call not in _CALLS:
                    raise _NotWeights("a call")
                stack.append(call(*arguments))
            case "BUILD":  # attributes of a state dict: the versions of its modules
                stack.pop()
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case other:
                raise _NotWeights(f"the instruction {other}")
    raise ValueError("no end")


def _tensor(path: Path, name: Any, value: Any) -> Tensor:
    """The named tensor, its bounds checked."""
    if isinstance(value, Tensor):
        return value
    if type(name) is not str or not isinstance(value, _View):
        kind = type(value).__name__
        raise BadInput(f"{path} holds {name!r} of type {kind}, where a state dict has tensors.")
    shape, strides = value.shape, value.strides
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise BadInput(f"{path} is damaged: tensor {name!r} has no readable shape.")
    return Tensor(name, value.storage, value.dtype, shape, strides, value.offset)


def write_pth(
    path: Path, tensors: Mapping[str, np.ndarray], done: Callable[[], object] = lambda: None
) -> None:
    """Writes what `torch.save` of a state dict writes; `done` is called after each tensor."""
    with zipfile.ZipFile(path, "w") as archive:
        _store(archive, "data.pkl", _pickled(tensors))
        _store(archive, "byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            _store(archive, f"data/{key}", _bytes(array))
            done()
        _store(archive, "version", b"3\n")


def _store(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds an entry whose bytes begin at a multiple of 64, as torch's do, for memory mapping."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    padding = -(archive.fp.tell() + 30 + len(entry.filename) + 4) % 64
    entry.extra = struct.pack("<2H", 0x4246, padding) + bytes(padding)  # "FB", torch's own tag
    archive.writestr(entry, content)


def _pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The description of a state dict, pickle protocol 2."""
    text = lambda s: pickle.BINUNICODE + struct.pack("<I", len(s.encode())) + s.encode()
    number = lambda n: pickle.LONG1 + b"\x08" + struct.pack("<q", n)
    numbers = lambda ns: pickle.MARK + b"".join(map(number, ns)) + pickle.TUPLE
    named = lambda module, name: pickle.GLOBAL + f"{module}\n{name}\n".encode()
    empty = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    names = {dtype: name for name, _, dtype in TYPES}
    parts = [pickle.PROTO + b"\x02", empty, pickle.MARK]
    for key, (name, array) in enumerate(tensors.items()):
        kind = named("torch", names[array.dtype])
        about = (text("storage"), kind, text(str(key)), text("cpu"), number(array.size))
        strides = numbers(_row_major(array.shape))
        view = (number(0), numbers(array.shape), strides, pickle.NEWFALSE, empty)
        parts += [text(name), named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        parts += [pickle.MARK, *about, pickle.TUPLE, pickle.BINPERSID]
        parts += [*view, pickle.TUPLE, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _bytes(array: np.ndarray) -> memoryview:
    """The values in row order; without a copy where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --- .safetensors -------------------------------------------------------------------------------


def _read_safetensors(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    whole = file.seek(0, io.SEEK_END)
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(whole - 8, MAX_DESCRIPTION):
        raise BadInput(f"{path} is damaged or cut short: its header would have {length} bytes.")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_twins)
        header.pop("__metadata__", None)
        return dict(_safe_tensors(path, header, 8 + length, whole))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged: its header cannot be read.") from error


def _safe_tensors(path: Path, header: dict, start: int, whole: int) -> Iterator:
    types = {name: dtype for _, name, dtype in TYPES}
    for name, about in header.items():
        (begin, end), shape = about["data_offsets"], tuple(about["shape"])
        if any(type(n) is not int for n in (begin, end, *shape)):
            raise ValueError("no whole number")
        dtype = types.get(about["dtype"])
        if dtype is None:
            raise BadInput(f"{path} holds {name!r} as {about['dtype']!r}, a type that is not read.")
        if not 0 <= begin <= end <= whole - start:
            raise BadInput(f"{path} is damaged or cut short: tensor {name!r} is beyond its end.")
        storage = Storage(path, start + begin, end - begin)
        tensor = Tensor(name, storage, dtype, shape, _row_major(shape))
        if tensor.nbytes != end - begin:
            raise tensor.wrong(f"of shape {shape} has {end - begin} bytes")
        yield name, tensor


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], done: Callable[[], object] = lambda: None
) -> None:
    """Writes a `.safetensors` file, wide types first, so that all are aligned; `done` as above."""
    names = {dtype: name for _, name, dtype in TYPES}
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header, end = {}, 0
    for name, array in order:
        header[name] = {
            "dtype": names[array.dtype],
            "shape": array.shape,
            "data_offsets": (end, end + array.nbytes),
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in order:
            file.write(_bytes(array))
            done()
