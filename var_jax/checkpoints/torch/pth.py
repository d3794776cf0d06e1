"""Tensors in PyTorch's `.pth` files, read and written without torch.

A `.pth` file is a zip archive: a pickle that describes the tensors, and an uncompressed entry of
bytes for each storage. Unpickling can run any code, so `Unpickler` knows only the few instructions
and names that describe tensors. The values stay on disk until NumPy asks for them.
"""

import contextlib
import dataclasses
import functools
import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from var_jax import BadInput

MAX_DESCRIPTION = 8 << 20  # bytes of the pickle; d36's has under 1, and each may become 100
DTYPES = {
    f"{name}Storage": np.dtype(kind)
    for name, kind in (
        *(("Double", "f8"), ("Float", "f4"), ("Half", "f2"), ("BFloat16", jnp.bfloat16)),
        *(("Long", "i8"), ("Int", "i4"), ("Short", "i2"), ("Char", "i1"), ("Byte", "u1")),
        ("Bool", "?"),
    )
}


class Archive:
    """The zip archive around a pickle and the bytes of its tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise self.damaged("its table of contents cannot be read") from error
        names = self.zip.namelist()
        if len(set(names)) != len(names):
            raise self.damaged("two of its entries have the same name")
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise BadInput(f"{path} is a zip archive without weights (no data.pkl of torch.save).")
        self.root = roots[0]

    def damaged(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is damaged or cut short: {what}.")

    def big_endian(self) -> BadInput:
        return BadInput(f"{self.path} is of a big-endian machine; only little-endian is read.")

    def entry(self, name: str) -> zipfile.ZipInfo:
        """An entry as torch writes it: uncompressed."""
        try:
            entry = self.zip.getinfo(self.root + name)
        except KeyError:
            raise self.damaged(f"its entry {name!r} is missing") from None
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise self.damaged(f"its entry {name!r} is compressed; torch's are not")
        return entry

    def read(self, entry: zipfile.ZipInfo) -> bytes:
        """The bytes of an entry, whose checksum holds."""
        try:
            return self.zip.read(entry)
        except Exception as error:  # zipfile has no common error for damage
            what = f"its entry {entry.filename!r} cannot be read ({error}); download the file again"
            raise self.damaged(what) from error

    def unpickle(self) -> Any:
        """The object that was saved: containers, numbers, text and tensors."""
        has_order = self.root + "byteorder" in self.zip.namelist()
        if has_order and self.read(self.entry("byteorder")) != b"little":
            raise self.big_endian()
        pickled = self.entry("data.pkl")
        if pickled.file_size > MAX_DESCRIPTION:
            raise self.damaged(f"the description of its tensors has {pickled.file_size} bytes")
        with self.unpickling():
            return Unpickler(self, io.BytesIO(self.read(pickled))).load()

    @contextlib.contextmanager
    def unpickling(self) -> Iterator[None]:
        """Turns whatever a pickle makes Python raise into BadInput."""
        try:
            yield
        except BadInput:
            raise
        except OtherType as error:
            raise BadInput(
                f"{self.path} holds a tensor of type {str(error)[:40]!r}, which is not read;"
                " expected real floats or integers: convert it in PyTorch (`tensor.float()`)."
            ) from None
        except NotWeights as error:
            raise BadInput(
                f"{self.path} holds more than weights ({error}), which could run code; it was not"
                " loaded."
            ) from None
        except Exception as error:  # whatever Python says to instructions that make no sense
            raise self.damaged("the description of its tensors cannot be read") from error


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file; `np.asarray` reads it."""

    archive: Archive
    entry: Any  # what `archive` calls one
    dtype: np.dtype
    # As the pickle says, so anything until `check` has seen it. Offset and strides in elements.
    offset: Any = 0
    shape: Any = ()
    strides: Any = ()
    name: str = ""

    def check(self) -> None:
        """Raises BadInput unless the tensor lies inside its entry."""
        axes = (self.shape, self.strides)
        tuples = all(type(axis) is tuple for axis in axes)
        numbers = (*self.shape, *self.strides, self.offset) if tuples else ("",)
        readable = tuples and len(self.shape) == len(self.strides) <= 8
        if not readable or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise self.archive.damaged(f"tensor {self.name!r} has shape and strides of no tensor")
        reach = self.offset + sum((n - 1) * s for n, s in zip(*axes, strict=True))
        size = self.entry.file_size
        if 0 not in self.shape and (reach + 1) * self.dtype.itemsize > size:
            raise self.archive.damaged(f"tensor {self.name!r} reaches beyond its {size} bytes")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, dtype or self.dtype)
        size, values = self.dtype.itemsize, self.archive.read(self.entry)
        strides = [stride * size for stride in self.strides]
        array = np.ndarray(self.shape, self.dtype, values, self.offset * size, strides)
        return np.asarray(array, dtype)


def check_tensors(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state dict, which know their names now.

    Raises: BadInput if one lies outside the file, or all take more memory than the file explains.
    """
    tensors = {name: dataclasses.replace(tensor, name=name) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.check()
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    if total > 2 * (size := path.stat().st_size):  # many views of the same bytes fill the memory
        raise BadInput(f"{path} describes {total} bytes of tensors but has only {size}.")
    return tensors


class NotWeights(Exception):
    """The pickle holds an instruction or a name that no description of tensors needs."""


class OtherType(Exception):
    """The pickle holds a tensor of another type than those of `DTYPES`: the message is its name."""


class Dict(dict):
    """A dict that keeps plain keys only: hashing a deep tuple would overflow the C stack."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) in (str, int):
            super().__setitem__(key, value)


class Opaque:
    """Stands for an object of a class that is not looked up, such as a trainer's arguments."""

    __slots__ = ("kind",)

    def __init__(self, kind: str, *args: Any):
        self.kind = kind

    def ignore(self, *args: Any) -> None:
        """What pickles do to containers."""

    append = extend = add = __setitem__ = ignore


def ordered_dict(pairs: Iterable[Any] = ()) -> Dict:
    """A dict of the pairs that pickles of Python 2 give, empty otherwise."""
    result = Dict()
    for key, value in pairs:
        result[key] = value
    return result


def of_other_type(*arguments: Any) -> None:
    """Raises OtherType: a tensor of a type that has no storage class, such as float8, names it."""
    kinds = [a.args[0] for a in arguments[1:] if isinstance(a, functools.partial)]  # no storage
    raise OtherType(kinds[-1] if kinds else "unknown")


# What a pickle may name: nothing of it is looked up or imported.
NAMES = {
    "collections.OrderedDict": ordered_dict,
    "collections.defaultdict": lambda *_: Dict(),
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: (
        dataclasses.replace(storage, offset=offset, shape=shape, strides=strides)
    ),
    "torch._utils._rebuild_tensor_v3": of_other_type,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
} | {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
# Nothing is called, but no file of weights asks for these.
HARMFUL = re.compile(
    r"(builtins|__builtin__)\.(?!(set|frozenset|slice|complex|bytes|bytearray|range|object)$)"
    r"|(os|posix|nt|subprocess|sys|shutil|importlib|runpy|ctypes)\."
)
# The instructions that may occur. Those that call something can only call what `find_class` gives.
INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE SHORT_BINSTRING EMPTY_TUPLE EMPTY_LIST TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT
    LONG_BINPUT MEMOIZE BINGET LONG_BINGET SETITEM SETITEMS APPEND APPENDS GLOBAL STACK_GLOBAL
    BINPERSID REDUCE BINBYTES SHORT_BINBYTES ADDITEMS POP
"""


def is_untyped(tag: Any, dtype: Any) -> bool:
    """Whether a storage has no type of its own, so that its tensor names it (`of_other_type`).

    Raises: OtherType for a storage of torch's whose values are not read.
    """
    if tag != "storage" or not isinstance(dtype, functools.partial):
        return False
    if (kind := dtype.args[0]) != "UntypedStorage":
        raise OtherType(kind.removesuffix("Storage"))
    return True


class Unpickler(pickle._Unpickler):
    """Python's unpickler in Python (the one in C allocates what a pickle says), cut down."""

    def __init__(self, archive: Archive, pickled: io.BytesIO):
        super().__init__(pickled)
        self.archive = archive

    def refuse(self) -> None:
        raise NotWeights("an instruction that no tensor needs")

    def find_class(self, module: str, name: str) -> Any:
        if (found := NAMES.get(f"{module}.{name}")) is not None:
            return found
        if HARMFUL.match(f"{module}.{name}"):
            raise NotWeights(f"it asks for {f'{module}.{name}'!r}")
        return functools.partial(Opaque, name)

    def persistent_load(self, pid: Any) -> Any:
        """The entry that a pickle refers to, as the tensor of its first value."""
        tag, dtype, key, _, count = pid
        if is_untyped(tag, dtype):
            return dtype
        if tag != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise NotWeights("a persistent object")
        entry = self.archive.entry(f"data/{key}")
        if type(count) is not int or entry.file_size != count * dtype.itemsize:
            what = f"its entry 'data/{key}' has {entry.file_size} bytes, not {count} values"
            raise self.archive.damaged(what)
        return Tensor(self.archive, entry, dtype)

    def load_dict(self) -> None:
        self.append(Dict())  # type: ignore[attr-defined]

    def load_build(self) -> None:  # attributes of a state dict: the versions of its modules
        self.stack.pop()  # type: ignore[attr-defined]

    def load_newobj(self) -> None:
        cls, _ = self.stack.pop(-2), self.stack.pop()  # type: ignore[attr-defined]
        if not isinstance(cls, functools.partial):
            raise NotWeights("an instruction that no tensor needs")
        self.append(cls())  # type: ignore[attr-defined]

    def load_set(self) -> None:
        self.append(Opaque("set"))  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), refuse) | {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS.split())
    }
    dispatch |= {pickle.EMPTY_DICT[0]: load_dict, pickle.BUILD[0]: load_build}
    dispatch |= {pickle.NEWOBJ[0]: load_newobj, pickle.EMPTY_SET[0]: load_set}


def write_pth(
    path: PurePath, tensors: Mapping[str, np.ndarray], done: Callable[[], object] = lambda: None
) -> None:
    """Writes what `torch.save` of a state dict writes; `done` is called after each tensor."""
    with zipfile.ZipFile(path, "w") as archive:
        store(archive, "data.pkl", describe(tensors))
        store(archive, "byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            store(archive, f"data/{key}", np.asarray(array, order="C").reshape(-1).view(np.uint8))
            done()
        store(archive, "version", b"3\n")


def store(archive: zipfile.ZipFile, name: str, content: Any) -> None:
    """Adds an entry whose bytes begin at a multiple of 64, as torch's do, for memory mapping."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    padding = -(archive.fp.tell() + 30 + len(entry.filename) + 4) % 64
    entry.extra = struct.pack("<2H", 0x4246, padding) + bytes(padding)  # "FB", torch's own tag
    archive.writestr(entry, memoryview(content))  # type: ignore[arg-type]


def describe(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of a state dict, protocol 2."""
    text = lambda s: pickle.BINUNICODE + struct.pack("<I", len(s.encode())) + s.encode()
    number = lambda n: pickle.LONG1 + b"\x08" + struct.pack("<q", n)
    numbers = lambda ns: pickle.MARK + b"".join(map(number, ns)) + pickle.TUPLE
    named = lambda module, name: pickle.GLOBAL + f"{module}\n{name}\n".encode()
    empty = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    kinds = {dtype: named("torch", name) for name, dtype in DTYPES.items()}
    parts = [pickle.PROTO + b"\x02", empty, pickle.MARK]
    for key, (name, array) in enumerate(tensors.items()):
        about = (text("storage"), kinds[array.dtype], text(str(key)), text("cpu"))
        strides = numbers(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
        view = (number(0), numbers(array.shape), strides, pickle.NEWFALSE, empty)
        parts += [text(name), named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        parts += [pickle.MARK, *about, number(array.size), pickle.TUPLE, pickle.BINPERSID]
        parts += [*view, pickle.TUPLE, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])
