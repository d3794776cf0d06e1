"""Standard output and error that never end a command."""

import errno
import io
import os
import sys


class _Pipe(io.FileIO):
    """A file that takes what is written when its reader has gone; a full disk it tells once."""

    failed = False

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.failed or error.errno in (errno.EPIPE, errno.EIO):
                return len(data)
            self.failed = True
            raise


def keep_streams_open() -> None:
    """Lets a command go on where nobody reads its output, or not all characters can be written.

    As after `| head`, in a terminal that was closed, with `>&-`, or names of classes in ASCII.
    """
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed stream's number would go to a file, which libraries then print into
    os.close(file)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)  # None if it was closed
        file, encoding = (number, old.encoding) if old else (os.devnull, "utf-8")
        raw = io.BufferedWriter(_Pipe(file, "wb", closefd=bool(not old)))
        options = {"errors": "backslashreplace", "line_buffering": True}
        setattr(sys, name, io.TextIOWrapper(raw, encoding, **options))
