"""Paths as users write them, each taken literally."""

import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Any
from urllib.parse import unquote

from etils import epath
from etils.epath import backend, stat_utils

from var_jax import BadInput

EXPECTED = "expected a local path, file:///PATH or gs://BUCKET/PATH"
LONGEST_NAME, LONGEST_PATH = 240, 3800  # bytes: what systems allow, less what is written inside
DEEPEST = 256  # folders; pathlib makes them by a call in a call, of which Python allows 1000


def user_path(text: object, name: str = "") -> epath.Path:
    """The path that a flag or a config field `name` gives: ~ expanded, file:// taken off.

    Raises: BadInput for what is no text, an empty path, an unknown scheme or user, what no file can
        be called, or what is no file, such as a pipe.
    """
    if isinstance(text, epath.Path):
        return text
    text = os.fspath(text) if isinstance(text, os.PathLike) else text
    if not isinstance(text, str):
        raise BadInput(f"{name or 'a path'} is {repr(text)[:40]}; expected text.")
    path = re.sub(r"^file://(localhost)?(?=/)", "", text, flags=re.IGNORECASE)
    path = unquote(path) if path != text else os.path.expanduser(path)
    path = re.sub(r"^gs://", "gs://", path, flags=re.IGNORECASE)
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", path)
    wrong = ""
    if not path.strip():
        wrong = f"no path is given; {EXPECTED}"
    elif scheme and not re.match(r"gs://[^/]", path):
        lacks = {"gs": "no bucket is named", "file": "files of other hosts are not read"}
        other = f"paths of the form {scheme[0]} are not read"
        wrong = f"{lacks.get(scheme[1].lower(), other)}; {EXPECTED}"
    elif os.name != "nt" and re.match(r"[A-Za-z]:\\", path) and not os.path.exists(path):
        wrong = f"this is a path of Windows; {EXPECTED}"
    elif path.startswith("~") and path == text:
        wrong = f"there is no home folder of that user; expected a known one, or ./{path}"
    elif _is_too_long(os.fsencode(path)):
        most = f"{LONGEST_NAME} bytes, {LONGEST_PATH} in all, {DEEPEST} folders"
        wrong = f"the name is too long; expected at most {most}"
        text = text[:40] + "…"
    elif "\0" in path or not _is_utf8(path):
        wrong = "no file can have that name; expected UTF-8 without zero bytes"
    elif is_pipe(path):
        wrong = "this is no file and no folder"
    if wrong:
        raise BadInput(f"{name}={text!r}: {wrong}." if name else f"{text!r}: {wrong}.")
    return epath.Path(path)


def is_pipe(path: str | PurePath) -> bool:
    """Whether a path is neither file nor folder: a pipe or a device, which might never answer."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _is_too_long(path: bytes) -> bool:
    names = path.split(b"/")
    longest = max(map(len, names))
    return longest > LONGEST_NAME or len(path) > LONGEST_PATH or len(names) > DEEPEST


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # bytes of another encoding, which JSON and protocol buffers lack
        return False


def _take_paths_literally(system: Any, path_class: Any) -> None:
    """Mends local paths of epath, which Orbax uses throughout.

    - `glob` took brackets and stars of the folder itself for a pattern, and so found nothing there.
    - `stat` failed where the owner of a file has no name, as in containers.
    - `open` waited for ever at a pipe that nobody writes to.
    - `iterdir` hid names that end in ~, so that folders with such files seemed empty.
    """
    plain_glob, plain_stat, plain_open = path_class.glob, system.stat, system.open

    def literal_glob(self, pattern: str) -> Iterator[epath.Path]:
        return plain_glob(type(self)(glob.escape(str(self))), pattern)

    def nameless_stat(self, path: str) -> stat_utils.StatResult:
        try:
            return plain_stat(self, path)
        except KeyError:
            found = os.stat(path)
            return stat_utils.StatResult(
                is_directory=stat.S_ISDIR(found.st_mode), length=found.st_size,
                mtime=int(found.st_mtime), mode=found.st_mode,
            )  # fmt: skip

    def open_file(self, path: str, mode: str) -> IO:
        if is_pipe(path):
            raise BadInput(f"{path} is no file; expected one, as pipes might never answer.")
        return plain_open(self, path, mode)

    path_class.glob, system.stat, system.open = literal_glob, nameless_stat, open_file
    system.listdir = lambda self, path: os.listdir(path)


_take_paths_literally(type(backend.os_backend), type(epath.Path()))
