"""TensorBoard's files, on disk as soon as a call returns.

tensorboardX's SummaryWriter writes on a thread, where errors such as a full disk are lost, and
cannot hide the steps that a resumed run repeats; so this uses what lies below it.
"""

import time
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboardX.summary import image


class Board:
    """One file of events in `folder`."""

    def __init__(self, folder: epath.Path):
        folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: in a bucket one of the same second would be written over.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to the curve of each name."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=points))

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Adds an image."""
        self._add(step, summary=image(name, np.asarray(pixels), dataformats="HWC"))

    def hide_from(self, step: int) -> None:
        """Hides what earlier files of the folder hold of `step` and later."""
        self._add(step, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()
