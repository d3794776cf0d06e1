"""Samples by the thousand: written batch by batch, resumed where a stopped run was, then joined.

Parts are named by their rows, so that a run may go on with other batches, devices and hosts.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Bool, Float, Int, Int32, Shaped

from var_jax import BadInput, Failure
from var_jax.sampling.generate import Sampler, generate
from var_jax.sampling.reject import best, candidates
from var_jax.sharding.mesh import of_first
from var_jax.sharding.ops import round_up
from var_jax.tools.files import PATIENCE, in_bucket, read_json, replacing
from var_jax.tools.logs import progress
from var_jax.tools.npz import has_end, join_npz, load_npz, save_npz

Score = Callable[[np.ndarray, np.ndarray, Any], Float[np.ndarray, " N"]]  # images, labels, tokens
# Settings that older versions did not have, and what they did.
ADDED = {"temperature": "1.0", "guidance": "ramp"}
LEFTOVER = re.compile(r"settings\.json|\.(settings\.json|(scores-)?[\d-]+\.npz)\.partial")


@dataclasses.dataclass(frozen=True)
class Job:
    """Samples of these labels, to be written to `out`; parts lie in `out`/parts meanwhile."""

    sampler: Sampler
    weights: Any
    labels: Int32[np.ndarray, " N"]
    out: epath.Path
    batch_size: int
    seed: int = 0
    with_tokens: bool = True  # mixed codes are no tokens

    @property
    def parts(self) -> epath.Path:
        """The folder of unfinished parts."""
        return self.out / "parts"

    def begin(self, settings: dict[str, Any]) -> None:
        """Makes the folder of parts this job's, whose command-line `settings` are these.

        Raises: BadInput if it holds parts of another job.
        """
        if jax.process_index() > 0:
            return
        about = self.parts / "settings.json"
        if about.exists() and any(self.parts.glob("*.npz")):
            check_settings(self.parts, read_json(about), settings)
            for part in [] if in_bucket(self.parts) else self.parts.glob("*.npz"):
                if not has_end(part):  # a disk was full, or lost power
                    part.unlink()
            return
        names = [path.name for path in self.parts.iterdir()] if self.parts.exists() else []
        if not all(map(LEFTOVER.fullmatch, names)):
            raise BadInput(
                f"{self.parts} was not made by this command; remove it or name another --out."
            )
        with replacing(about) as beside:
            beside.write_text(json.dumps(settings))

    def choose(
        self, keep: float, score: Score, everywhere: bool = False
    ) -> Int32[np.ndarray, " N"]:
        """The index of the image to draw for each label: of 1/keep as many the best by `score`.

        Each process scores the rows that it has, or all of them together score all if `everywhere`.
        """
        index = candidates(self.labels, keep)
        wanted = self.labels[index % len(self.labels)]

        def scored(rows: slice, images: np.ndarray, tokens: Any) -> dict[str, np.ndarray]:
            scores = np.asarray(score(images, wanted[rows], tokens), np.float64)
            if (wrong := scores.shape != (len(images),)) or not np.isfinite(scores).all():
                what = f"of shape {scores.shape}" if wrong else "not finite"
                raise BadInput(f"the scores of images are {what}; expected a number for each.")
            return {"scores": scores}

        self.write(wanted, index, scored, "scores-", "scoring", everywhere)

        def chosen() -> np.ndarray:
            scores = self.rows("scores", len(index), "scores-")
            return index[best(scores, wanted, self.labels)]

        return of_first(chosen, self.labels.shape, np.int32)

    def sample(self, index: Int32[np.ndarray, " N"]) -> None:
        """Writes the images of these indices."""

        def kept(rows: slice, images: np.ndarray, tokens: Any) -> dict[str, np.ndarray]:
            part = {"arr_0": images, "labels": self.labels[rows]}
            return part if tokens is None or not self.with_tokens else part | {"tokens": tokens}

        self.write(self.labels, index, kept, "", "sampling")

    def once(self, settings: dict[str, Any]) -> epath.Path:
        """samples.npz of all labels in order, unless it is there; with it lie its settings.

        Raises: BadInput if the folder holds samples of other settings.
        """
        done, path = self.out / "settings.json", self.out / "samples.npz"
        if of_first(lambda: np.array(done.exists() and path.exists()), (), bool):
            if jax.process_index() == 0:
                check_settings(self.out, read_json(done), settings)
                self.remove_parts()  # that a kill left
            return path
        self.begin(settings)
        self.sample(np.arange(len(self.labels), dtype=np.int32))
        if jax.process_index() == 0:
            self.join()
            with replacing(done) as beside:
                beside.write_text(json.dumps(settings))
            self.remove_parts()
        sync_global_devices("samples are joined")
        return path

    def write(
        self,
        labels: Int32[np.ndarray, " M"],
        index: Int32[np.ndarray, " M"],
        part_of: Callable[[slice, np.ndarray, Any], dict[str, np.ndarray]],
        prefix: str,
        doing: str,
        everywhere: bool = False,
    ) -> None:
        """Samples batch by batch; each process writes what `part_of` makes of the rows it has.

        Or each process has all rows, and process 0 writes, if `everywhere`. A batch is of the same
        rows whoever samples it, or again after a stop; rows that are there already are not written.
        """
        count, size = len(labels), round_up(min(self.batch_size, len(labels)))
        missing = of_first(lambda: self.missing(prefix, count), (count,), np.int32)
        number = np.arange(count) // size
        rows = np.flatnonzero(np.isin(number, number[missing > 0]))
        batches = generate(
            self.sampler, self.weights, labels[rows], index=index[rows], batch_size=size,
            seed=self.seed, everywhere=everywhere,
        )  # fmt: skip
        with progress(count, count - len(rows), doing) as bar:
            for batch in batches:
                here = rows[batch.rows]
                for run in runs(here, missing[here] > 0):
                    images = batch.images[run]
                    tokens = None if batch.tokens is None else batch.tokens[run]
                    which = slice(here[run][0], here[run][-1] + 1)
                    path = self.parts / f"{prefix}{which.start:08d}-{which.stop:08d}.npz"
                    part = part_of(which, images, tokens)
                    if not everywhere or jax.process_index() == 0:
                        save_npz(path, **part)
                bar.update(len(here) * (1 if everywhere else jax.process_count()))
        sync_global_devices(f"{doing} is done")

    def found(self, prefix: str) -> list[tuple[range, epath.Path]]:
        """The parts that are there, in order, and their rows."""
        name = re.compile(prefix + r"(\d{8,})(?:-(\d{8,}))?\.npz")
        parts = []
        for path in self.parts.iterdir():
            if match := name.fullmatch(path.name):
                start = int(match[1])  # older versions named no end
                stop = int(match[2] or start + len(next(iter(load_npz(path).values()))))
                parts.append((range(start, stop), path))
        return sorted(parts, key=lambda part: part[0].start)

    def missing(self, prefix: str, count: int) -> Int32[np.ndarray, " M"]:
        """1 for each row that no part holds."""
        missing = np.ones(count, np.int32)
        for rows, _ in self.found(prefix):
            missing[rows.start : rows.stop] = 0
        return missing

    def cover(self, count: int, prefix: str = "") -> list[tuple[epath.Path, int]]:
        """Parts that hold `count` rows in order, and how many of its first rows each repeats."""
        end, parts = time.monotonic() + PATIENCE, []
        while self.missing(prefix, count).any() and time.monotonic() < end:
            time.sleep(1)  # until what another host wrote is seen here
        done = 0
        for rows, path in self.found(prefix):
            if rows.start <= done < min(rows.stop, count):
                parts.append((path, done - rows.start))
                done = rows.stop
        if done < count:
            raise Failure(f"{self.parts} holds no image {done}, which was written there.")
        return parts

    def rows(self, name: str, count: int, prefix: str = "") -> Shaped[np.ndarray, "N ..."]:
        """The first `count` rows of an array that lies in parts."""
        parts = self.cover(count, prefix)
        return np.concatenate([load_npz(path, name)[name][skip:] for path, skip in parts])[:count]

    def join(self) -> epath.Path:
        """Joins the parts to samples.npz."""
        path = self.out / "samples.npz"
        join_npz(path, self.cover(len(self.labels)), len(self.labels))
        return path

    def remove_parts(self) -> None:
        """Removes the parts, the record of their settings last: a kill may come between."""
        if self.parts.exists():
            for part in self.parts.glob("*.npz"):
                part.unlink()
            self.parts.rmtree()

    def finish(self) -> epath.Path:
        """Joins the parts to samples.npz and removes them."""
        path = self.join()
        self.remove_parts()
        return path


def check_settings(folder: epath.Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises BadInput if what lies in a folder was sampled with settings other than these."""
    advice = "set them back, remove the folder, or name another --out."
    if found.get("weights") != settings["weights"]:
        raise BadInput(f"{folder} holds samples of other weights; {advice}")
    found = ADDED | found
    for name, now in settings.items():
        if str(then := found.get(name)) != str(now):
            raise BadInput(f"{folder} holds samples with --{name}={then}, not {now}; {advice}")


def runs(rows: Int[np.ndarray, " b"], wanted: Bool[np.ndarray, " b"]) -> list[np.ndarray]:
    """Where `rows` are wanted, in runs of consecutive numbers."""
    where = np.flatnonzero(wanted)
    return np.split(where, 1 + np.flatnonzero(np.diff(rows[where]) != 1)) if len(where) else []
