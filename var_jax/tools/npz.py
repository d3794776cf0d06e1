"""npz files: images read a few at a time, arrays written whole or not at all."""

import contextlib
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import IO

import numpy as np
from etils import epath
from jaxtyping import UInt8

from var_jax import BadInput
from var_jax.tools.files import replacing
from var_jax.tools.paths import user_path

# Deflate makes at most 1/1030 of anything, of images hardly ever less than 1/10.
BOMB_RATIO, BOMB_BYTES = 200, 2**28
BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, SyntaxError, KeyError,
    NotImplementedError, RuntimeError, OverflowError, struct.error, lzma.LZMAError,
)  # fmt: skip


@contextlib.contextmanager
def reading(path: str | PurePath) -> Iterator[None]:
    """Turns what NumPy and zipfile raise for a file that is damaged or no npz into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise BadInput(f"{path} claims more than memory holds ({error}).") from error
    except BROKEN as error:
        if "allow_pickle" in str(error):
            raise BadInput(
                f"{path} holds an array of objects, and objects could run code: nothing of them is"
                " read; expected arrays of numbers or text (images of one size)."
            ) from error
        raise BadInput(f"{path} is no npz file, or a damaged one ({error}).") from error


def check_unpacked_size(path: str | PurePath, file: IO[bytes]) -> None:
    """Raises BadInput if a member of the npz would be far larger in memory than in the file."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.file_size > max(BOMB_BYTES, BOMB_RATIO * member.compress_size):
                raise BadInput(
                    f"{path} holds {member.filename!r}, {member.compress_size / 1e6:.1f} MB that"
                    f" unpack to {member.file_size / 1e9:.1f} GB: a decompression bomb."
                )
    file.seek(0)


def is_npz(spec: str) -> bool:
    """Whether what names images names an npz: by its suffix, in any case; a folder is none."""
    return spec.lower().endswith(".npz") and not user_path(spec).is_dir()


class NpzImages:
    """`arr_0` of an npz, uint8 (N,H,W,3), of which only one batch is in memory.

    Raises: BadInput if the file cannot be read or holds something else.
    """

    def __init__(self, path: str | PurePath):
        self.path = user_path(path)
        with self._open() as file:
            self.shape = self._header(file)

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images in order, `size` at a time, the last batch maybe smaller."""
        with self._open() as file:
            left, *image = self._header(file)
            while left:
                count = min(size, left)
                data = file.read(count * int(np.prod(image)))
                yield np.frombuffer(data, np.uint8).reshape(count, *image)
                left -= count

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipExtFile]:
        with (
            reading(self.path),
            self.path.open("rb") as whole,
            zipfile.ZipFile(whole) as archive,
        ):
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(n.removesuffix(".npy") for n in archive.namelist())
                raise BadInput(f"{self.path} holds {names or 'nothing'}, expected 'arr_0'.")
            with archive.open("arr_0.npy") as file:
                yield file  # type: ignore[misc]

    def _header(self, file: zipfile.ZipExtFile) -> tuple[int, ...]:
        version, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read[version > 1](file)
        if dtype != np.uint8 or by_column or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            order = ", stored by columns" if by_column else ""
            raise BadInput(
                f"{self.path} holds 'arr_0' as {dtype} of shape {shape}{order}; expected uint8"
                " images (N, H, W, 3)."
            )
        return shape


def save_npz(path: str | PurePath, **arrays: np.ndarray) -> None:
    """Writes an npz; beside first, then renamed into place."""
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    with replacing(path) as beside:
        beside.write_bytes(data.getvalue())


def join_npz(
    path: str | PurePath, parts: Sequence[tuple[str | PurePath, int]], length: int
) -> None:
    """Writes the arrays of several npz files, joined to `length` rows, as one npz.

    Of each part its first so many rows are left out. Memory holds one of them; beside first, then
    renamed into place.
    """
    with replacing(path) as new, new.open("wb") as whole, zipfile.ZipFile(whole, "w") as archive:
        for name in load_npz(parts[0][0]):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                for number, (part, skipped) in enumerate(parts):
                    array = load_npz(part, name)[name][skipped:]
                    if number == 0:
                        about = np.lib.format.header_data_from_array_1_0(array)
                        about["shape"] = (length, *array.shape[1:])
                        np.lib.format.write_array_header_1_0(member, about)  # type: ignore
                    member.write(np.ascontiguousarray(array).data)


def load_others(path: str | PurePath) -> dict[str, np.ndarray]:
    """The arrays of a user's npz other than its images, `arr_0`.

    Raises: BadInput if there is no such file, or it is damaged or a bomb.
    """
    path = user_path(path)
    with reading(path), path.open("rb") as file:
        check_unpacked_size(path, file)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays if name != "arr_0"}


def has_images(path: str | PurePath) -> bool:
    """Whether a user's npz has an `arr_0`. Raises: BadInput if it cannot be read."""
    path = user_path(path)
    with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return "arr_0" in arrays


def load_npz(path: str | PurePath, *names: str) -> dict[str, np.ndarray]:
    """The named arrays of an npz, all of them by default. Raises: BadInput if it is damaged."""
    with (
        reading(path),
        epath.Path(path).open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        return {name: arrays[name] for name in names or arrays}


def has_end(path: str | PurePath) -> bool:
    """Whether an npz ends as one does: one that was cut short lacks its directory."""
    with epath.Path(path).open("rb") as file:
        return zipfile.is_zipfile(file)


def is_whole(path: str | PurePath) -> bool:
    """Whether there is an npz that can be read to its end."""
    try:
        load_npz(path)
    except BadInput:
        return False
    return True
