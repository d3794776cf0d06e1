"""Tensors in `.safetensors` files, through the library of that name, which checks what it reads."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from var_jax import BadInput

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16} | {
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file; `np.asarray` reads it."""

    file: Any
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.file.get_tensor(self.name)
        return array if dtype is None else array.astype(dtype)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; reads their description alone.

    Raises: BadInput if the file is damaged, or holds numbers of another type.
    """
    tensors = {}
    try:
        file = safe_open(path, framework="numpy")
        for name in file.keys():  # noqa: SIM118  # no dict
            about = file.get_slice(name)
            kind = about.get_dtype()
            if kind not in DTYPES:
                raise BadInput(f"{path} holds {name!r} as {kind}, a type that is not read.")
            dtype, shape = np.dtype(DTYPES[kind]), tuple(about.get_shape())
            tensors[name] = Tensor(file, name, dtype, shape)
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged or cut short: {error}.") from error
    return tensors


def write_safetensors(
    path: PurePath, tensors: Mapping[str, np.ndarray], done: Callable[[], object] = lambda: None
) -> None:
    """Writes a `.safetensors` file; `done` is called for each tensor."""
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path)
    for _ in tensors:
        done()
