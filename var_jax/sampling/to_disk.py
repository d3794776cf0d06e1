"""Samples by the thousand: written batch by batch, resumed where a stopped run was, then joined."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int32, Shaped

from var_jax import BadInput
from var_jax.sampling.generate import Generated, Sampler, generate
from var_jax.sampling.reject import best, candidates
from var_jax.tools.files import replacing
from var_jax.tools.logs import progress
from var_jax.tools.npz import join_npz, load_npz, save_npz

Score = Callable[[np.ndarray, np.ndarray], Float[np.ndarray, " N"]]
LEFTOVER = re.compile(r"settings\.json|\.(settings\.json|(scores-)?\d{8,}\.npz)\.partial")


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
        about = self.parts / "settings.json"
        if about.exists() and any(self.parts.glob("*.npz")):
            check_settings(self.parts, json.loads(about.read_text()), settings)
            return
        names = [path.name for path in self.parts.iterdir()] if self.parts.exists() else []
        if not all(map(LEFTOVER.fullmatch, names)):
            raise BadInput(
                f"{self.parts} was not made by this command; remove it or name another --out."
            )
        with replacing(about) as beside:
            beside.write_text(json.dumps(settings))

    def choose(self, keep: float, score: Score) -> Int32[np.ndarray, " N"]:
        """The index of the image to draw for each label: of 1/keep as many the best by `score`."""
        index = candidates(self.labels, keep)
        wanted = self.labels[index % len(self.labels)]

        def scored(rows: slice, images: np.ndarray, tokens: Any) -> dict[str, np.ndarray]:
            scores = np.asarray(score(images, wanted[rows]), np.float64)
            if (wrong := scores.shape != (len(images),)) or not np.isfinite(scores).all():
                what = f"shape {scores.shape}" if wrong else "numbers that are not finite"
                raise BadInput(f"--scorer returned {what}; expected one score for each image.")
            return {"scores": scores}

        paths = self.write(wanted, index, scored, "scores-", "scoring")
        scores = np.concatenate([load_npz(path)["scores"] for path in paths])
        return index[best(scores, wanted, self.labels)]

    def sample(self, index: Int32[np.ndarray, " N"]) -> list[epath.Path]:
        """Writes the images of these indices, and returns their parts."""

        def kept(rows: slice, images: np.ndarray, tokens: Any) -> dict[str, np.ndarray]:
            part = {"arr_0": images, "labels": self.labels[rows]}
            return part | {"tokens": tokens} if self.with_tokens else part

        return self.write(self.labels, index, kept, "", "sampling")

    def write(
        self,
        labels: Int32[np.ndarray, " M"],
        index: Int32[np.ndarray, " M"],
        part_of: Callable[[slice, np.ndarray, Any], dict[str, np.ndarray]],
        prefix: str,
        doing: str,
    ) -> list[epath.Path]:
        """Samples batch by batch and writes what `part_of` makes of each, unless it is there."""
        count, size = len(labels), self.batch_size
        paths = {i: self.parts / f"{prefix}{i:08d}.npz" for i in range(0, count, size)}
        left = [range(i, min(i + size, count)) for i, path in paths.items() if not path.exists()]
        if left:
            rows = np.concatenate(left)
            made = generate(
                self.sampler, self.weights, labels[rows], index=index[rows], batch_size=size,
                seed=self.seed,
            )  # fmt: skip
            with progress(count, count - len(rows), doing) as bar:
                images = one_by_one(made)
                for part in left:  # a batch may be more than a part: the mesh rounds it up
                    stacked = map(stack, zip(*islice(images, len(part)), strict=True))
                    kept = part_of(slice(part.start, part.stop), *stacked)
                    save_npz(paths[part.start], **kept)
                    bar.update(len(part))
        return list(paths.values())

    def first_rows(
        self, paths: list[epath.Path], name: str, count: int
    ) -> Shaped[np.ndarray, "N ..."]:
        """The first `count` rows of an array that lies in parts."""
        needed = paths[: -(-count // self.batch_size)]
        return np.concatenate([load_npz(path, name)[name] for path in needed])[:count]

    def finish(self, paths: list[epath.Path]) -> epath.Path:
        """Joins the parts to samples.npz and removes them."""
        path = self.out / "samples.npz"
        join_npz(path, paths, len(self.labels))
        for part in self.parts.glob("*.npz"):  # settings.json last: a kill may come between
            part.unlink()
        self.parts.rmtree()
        return path


def check_settings(parts: epath.Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises BadInput if unfinished parts are of a job with other settings."""
    advice = "finish that, remove the folder, or name another --out."
    if found.get("weights") != settings["weights"]:
        raise BadInput(f"{parts} holds an unfinished run of other weights; {advice}")
    for name, value in settings.items():
        if str(found.get(name)) != str(value):
            raise BadInput(
                f"{parts} holds an unfinished run with --{name}={found.get(name)}, not {value};"
                f" {advice}"
            )


def one_by_one(batches: Iterator[Generated]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Each image and its tokens, if there are any."""
    for batch in batches:
        tokens = repeat(None) if batch.tokens is None else batch.tokens
        yield from zip(batch.images, tokens, strict=False)


def stack(rows: tuple[Any, ...]) -> Any:
    """Rows as one array; None of those that are None."""
    return None if rows[0] is None else np.stack(rows)
