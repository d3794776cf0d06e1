"""Files that are whole or not there."""

import contextlib
from collections.abc import Iterator
from pathlib import PurePath

from etils import epath


@contextlib.contextmanager
def replacing(path: str | PurePath) -> Iterator[epath.Path]:
    """A path beside `path` to write to: renamed into its place at the end, gone after an error."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.partial"
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink(missing_ok=True)
        raise
