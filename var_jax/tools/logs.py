"""What a run writes down: metrics (JSON lines and TensorBoard) and progress on the terminal."""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, SupportsFloat

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from var_jax.tools.files import in_bucket, replacing

if TYPE_CHECKING:
    from var_jax.tools.tensorboard import Board

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_COPIES = 60.0


class Metrics:
    """Appends to `workdir`/metrics.jsonl and TensorBoard's `workdir`/tensorboard/STAGE.

    Only process 0 writes. In a bucket there is no appending: metrics.jsonl is rewritten each time,
    TensorBoard's files are kept on local disk and copied there once a minute.
    """

    def __init__(self, workdir: str | PurePath):
        self._workdir = self._local = epath.Path(workdir)
        self._writes = jax.process_index() == 0
        self._remote = in_bucket(workdir)
        self._copied = time.monotonic()
        if self._remote:
            folder = tempfile.TemporaryDirectory(prefix="tensorboard")
            self._local, self._folder = epath.Path(folder.name), folder  # removed with this object
        self._boards: dict[str, Board] = {}
        if self._writes:
            self._workdir.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, step: int, *, file: str = "metrics.jsonl", **scalars) -> None:
        """One record {"stage", "step", scalars…}: numbers, arrays of one number, or text.

        Figures that no two runs share, of time and speed, go to another `file`.
        """
        if not self._writes:
            return
        numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
        line = json.dumps({"stage": stage, "step": int(step), **numbers}) + "\n"
        path = self._workdir / file
        if self._remote:
            path.write_text((path.read_text() if path.exists() else "") + line)
        else:
            with path.open("a") as out:
                out.write(line)
        shown = {f"{stage}/{name}": x for name, x in numbers.items() if not isinstance(x, str)}
        self._board(stage).scalars(step, shown)
        self._copy(SECONDS_BETWEEN_COPIES)

    def image(self, stage: str, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an image in TensorBoard."""
        if self._writes:
            self._board(stage).image(step, f"{stage}/{name}", image)
            self._copy(SECONDS_BETWEEN_COPIES)

    def records(self) -> list[dict]:
        """What metrics.jsonl holds so far."""
        return read_metrics(self._workdir)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` wrote after `step`, and a last line that a kill cut in half.

        After it, a run resumed from `step` writes the file that a run never stopped would have.
        """
        if not self._writes:
            return
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            kept = [r for r in self.records() if r["stage"] != stage or r["step"] <= step]
            with replacing(path) as beside:
                beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.close()
        self._board(stage).hide_from(step + 1)

    def close(self) -> None:
        """Closes TensorBoard's files."""
        boards, self._boards = self._boards, {}
        for board in boards.values():
            board.close()
        self._copy()

    def _copy(self, seconds: float = 0.0) -> None:
        """Copies TensorBoard's files to a bucket, if the last time was so long ago."""
        if not self._remote or time.monotonic() - self._copied < seconds:
            return
        self._copied = time.monotonic()
        for path in self._local.glob("tensorboard/*/*"):
            target = self._workdir / path.relative_to(self._local)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())

    def _board(self, stage: str) -> "Board":
        if stage not in self._boards:
            from var_jax.tools.tensorboard import Board

            self._boards[stage] = Board(self._local / "tensorboard" / stage)
        return self._boards[stage]


def read_metrics(workdir: str | PurePath) -> list[dict]:
    """The records of `workdir`/metrics.jsonl in the order written; [] if there is no such file."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A line without its newline was cut by a kill, even where the part left is valid JSON.
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
