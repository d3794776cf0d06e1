"""What a run writes down: metrics (JSON lines and TensorBoard) and progress on the terminal."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, SupportsFloat

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from var_jax.tools.buckets import Mirror
from var_jax.tools.files import in_bucket, replacing
from var_jax.tools.images import going_on_without

if TYPE_CHECKING:
    from var_jax.tools.tensorboard import Board

SECONDS_BETWEEN_LINES = 30.0


class Metrics:
    """Appends to `workdir`/metrics.jsonl and TensorBoard's `workdir`/tensorboard/STAGE.

    Only process 0 writes. Of a bucket there is a mirror on local disk, which a thread copies: no
    step waits for it, and no error ends the run.
    """

    def __init__(self, workdir: str | PurePath):
        self._folder, self._mirror = epath.Path(workdir), None
        self._writes = jax.process_index() == 0
        self._boards: dict[str, Board] = {}
        self._shows = True  # TensorBoard, which is only to be looked at
        if self._writes and in_bucket(workdir):
            self._mirror = Mirror(self._folder, ("metrics.jsonl", "speed.jsonl"))
            self._folder = self._mirror.local
        elif self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, step: int, *, file: str = "metrics.jsonl", **scalars) -> None:
        """One record {"stage", "step", scalars…}: numbers, arrays of one number, or text.

        Figures that no two runs share, of time and speed, go to another `file`.
        """
        if not self._writes:
            return
        numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
        with (self._folder / file).open("a") as out:
            out.write(json.dumps({"stage": stage, "step": int(step), **numbers}) + "\n")
        shown = {f"{stage}/{name}": x for name, x in numbers.items() if not isinstance(x, str)}
        self._show(stage, lambda board: board.scalars(step, shown))

    def image(self, stage: str, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an image in TensorBoard."""
        if self._writes:
            self._show(stage, lambda board: board.image(step, f"{stage}/{name}", image))

    def records(self) -> list[dict]:
        """What metrics.jsonl holds so far."""
        return read_metrics(self._folder)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` wrote after `step`, and what a kill or a power cut left of a line.

        After it, a run resumed from `step` writes the file that a run never stopped would have.
        """
        if not self._writes:
            return
        path = self._folder / "metrics.jsonl"
        if path.exists():
            kept = [r for r in self.records() if r["stage"] != stage or r["step"] <= step]
            with replacing(path) as beside:
                beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._close_boards()
        self._show(stage, lambda board: board.hide_from(step + 1))

    def flush(self) -> None:
        """Waits until a bucket has what was written; ahead of a checkpoint, which resumes there."""
        if self._mirror:
            self._mirror.copy()

    def close(self) -> None:
        """Closes TensorBoard's files."""
        self._close_boards()
        self.flush()

    def _close_boards(self) -> None:
        boards, self._boards = self._boards, {}
        for board in boards.values():
            with going_on_without("TensorBoard"):
                board.close()

    def _show(self, stage: str, draw: Callable[["Board"], None]) -> None:
        """Draws in TensorBoard until its first error; copies later what has been written."""
        shows, self._shows = self._shows, False
        if shows:
            with going_on_without("TensorBoard"):
                draw(self._board(stage))
                self._shows = True
        if self._mirror:
            self._mirror.schedule()

    def _board(self, stage: str) -> "Board":
        if stage not in self._boards:
            from var_jax.tools.tensorboard import Board

            self._boards[stage] = Board(self._folder / "tensorboard" / stage)
        return self._boards[stage]


def read_metrics(workdir: str | PurePath) -> list[dict]:
    """The records of `workdir`/metrics.jsonl in the order written; [] if there is no such file.

    Lines that are no records, as a power cut leaves them, are told on stderr and left out.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    # Behind the last newline is a line that a kill cut, even where it is valid JSON.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = [record for line in lines if (record := _record(line))]
    if damaged := len(lines) - len(records):
        print(f"{path}: damaged lines left out: {damaged}", file=sys.stderr, flush=True)
    return records


def _record(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is no record."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(found, dict) and type(found.get("step")) is int
    return found if is_record and isinstance(found.get("stage"), str) else None


@contextlib.contextmanager
def progress(total: int, initial: int = 0, description: str = ""):
    """Progress on stderr: a bar with rate and time left, or off a terminal a line every 30 s.

    `with progress(1000, 0, "training") as bar: bar.update(1, loss=2.31)`.
    """
    if not sys.stderr.isatty():
        yield _Lines(total, initial, description)
        return
    columns, rows = shutil.get_terminal_size()  # 80 x 24 where a terminal says 0
    with _Bar(total=total, initial=initial, desc=description, ncols=columns, nrows=rows) as bar:
        yield bar


def _short(metrics: Mapping[str, SupportsFloat]) -> dict[str, str]:
    """Numbers, or arrays of one number, in four digits."""
    return {name: f"{float(value):.4g}" for name, value in metrics.items()}


class _Bar(tqdm):
    def update(self, n: int = 1, **metrics: SupportsFloat) -> None:
        """Counts `n` more steps and shows `metrics`."""
        if metrics:
            self.set_postfix(_short(metrics), refresh=False)
        super().update(n)


class _Lines:
    def __init__(self, total: int, initial: int, description: str):
        self._total, self._description = total, description
        self._done, self._metrics = initial, {}
        self._first: tuple[float, int] | None = None  # after the first step, which compiles
        self._printed = time.monotonic()

    def update(self, n: int = 1, **metrics: SupportsFloat) -> None:
        """Counts `n` more steps; prints a line if the last one is old enough."""
        self._done += n
        self._metrics = metrics or self._metrics
        now = time.monotonic()
        start, before = self._first = self._first or (now, self._done)
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        values = "".join(f", {name} {value}" for name, value in _short(self._metrics).items())
        if self._done > before:
            rate = (self._done - before) / (now - start)
            left = tqdm.format_interval((self._total - self._done) / rate)
            values += f", {rate:.3g}/s, {left} left"
        line = f"{self._description} {self._done}/{self._total}{values}"
        print(line, file=sys.stderr, flush=True)
