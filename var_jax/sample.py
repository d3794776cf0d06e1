"""Draws images from a checkpoint.

    python -m var_jax.sample --checkpoint emoji --labels "Smileys & Emotion" --num 24 --out samples

Writes samples.npz (`arr_0` uint8 N,H,W,3; `labels`; `tokens` int32 N,L) and grid.png. Image i comes
from the seed and i alone, not from batch size or devices; a stopped run goes on where it was. Disk
holds all images twice at the end, memory one batch.
"""

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Int32, Shaped, UInt8

from var_jax import BadInput
from var_jax.data.sources import open_source
from var_jax.data.write_tokens import fingerprint
from var_jax.evaluation.pixel_report import scorer
from var_jax.models.load import Models, load_models
from var_jax.sampling.generate import coarse_to_fine, generate
from var_jax.sampling.reject import best, candidates
from var_jax.sharding.mesh import make_mesh
from var_jax.tools import cli
from var_jax.tools.files import replacing
from var_jax.tools.images import grid, save_png
from var_jax.tools.logs import progress
from var_jax.tools.npz import join_npz, load_npz, save_npz

CHECKPOINT = flags.DEFINE_string("checkpoint", None, 'A folder, or "emoji".', required=True)
LABELS = flags.DEFINE_list(
    "labels",
    None,
    "Class numbers or names, each with a count if you like: 207:50,88:10. Default: all classes. An"
    " entry with a comma in its name goes in double quotes: --labels '\"tench, Tinca:50\",88:10'.",
)
NUM = flags.DEFINE_integer(
    "num", None, "How many images, in turn over the labels; the first get one more if need be."
)
CFG, TOP_K, TOP_P = cli.sampling_flags()
SMOOTH = flags.DEFINE_bool("smooth", False, "Mix codes: nicer to look at, not for metrics.")
REJECT = flags.DEFINE_float(
    "reject", 1.0, "Draw more and keep this share of each class, the best by --scorer.", 1e-4, 1
)
SCORER = flags.DEFINE_string(
    "scorer",
    None,
    "MODULE:FUNCTION that takes images (uint8 N,H,W,3) and labels (N) and returns N scores, higher"
    " is better. Default, for the emoji only: a classifier fitted on them.",
)
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same images.", 0, 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.", 1)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "What the transformer computes in; bfloat16 also halves its weights in memory. auto: as the"
    " checkpoint says, which by default is bfloat16 on accelerators and float32 on CPU.",
)
SHOW_SCALES = flags.DEFINE_bool(
    "show_scales", False, "Also write scales.png: the first images after each scale, a row each."
)
OUT = flags.DEFINE_string("out", "samples", "Folder to write.")
SHOWN, ROWS = 100, 8  # images in grid.png and in scales.png

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def main(argv: list[str]) -> None:
    """Samples in batches, each saved at once; joins them at the end."""
    cli.no_arguments(argv)
    if SHOW_SCALES.value and SMOOTH.value:
        raise BadInput("--show_scales needs tokens, and --smooth mixes them; give one of the two.")
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        models = load_models(CHECKPOINT.value, mesh, DTYPE.value)
        labels = wanted_labels(models)
        score = load_scorer(models) if REJECT.value < 1 else None
        out = epath.Path(OUT.value)
        models = models.drawn(CFG.value, TOP_K.value, TOP_P.value)
        parts = claim(out, models)
        index = np.arange(len(labels), dtype=np.int32)
        if score is not None:
            index = candidates(labels, REJECT.value)
            index = index[accepted(models, labels, index, score, parts)]
        paths = sample_parts(models, labels, index, parts)
        if SHOW_SCALES.value:
            save_png(out / "scales.png", scales(models, first_rows(paths, "tokens", ROWS)))
    images = first_rows(paths, "arr_0", SHOWN)
    scale = max(1, 96 // images.shape[1])
    save_png(out / "grid.png", grid(images, columns=min(len(images), 10), scale=scale))
    join_npz(out / "samples.npz", paths, len(labels))
    clear(parts)
    are = "1 image is" if len(labels) == 1 else f"{len(labels)} images are"
    print(f"{are} in {out / 'samples.npz'}, the first {len(images)} in {out / 'grid.png'}")


def clear(parts: epath.Path) -> None:
    """Removes the parts, last what tells that they are this command's: a kill may come between."""
    for path in parts.glob("*.npz"):
        path.unlink()
    parts.rmtree()


def wanted_labels(models: Models) -> Int32[np.ndarray, " N"]:
    """The class of each image. Raises: BadInput for a class that does not exist."""
    if not LABELS.value and NUM.value is None:
        raise BadInput("say what to draw: --labels, --num or both.")
    entries = [counted(entry.strip(), models) for entry in LABELS.value or ()]
    chosen = np.array([i for i, _ in entries] or range(len(models.class_names)), np.int32)
    if any(count is not None for _, count in entries):
        if NUM.value is not None:
            raise BadInput(f"--labels holds counts, so --num={NUM.value} has no place.")
        return np.repeat(chosen, [1 if count is None else count for _, count in entries])
    count = len(chosen) if NUM.value is None else NUM.value
    if count < 1:
        raise BadInput(f"--num={count}; expected at least 1.")
    return np.resize(chosen, count)


def counted(entry: str, models: Models) -> tuple[int, int | None]:
    """Class and count of "class" or "class:count"; a name may hold colons itself."""
    name, _, count = entry.rpartition(":")
    whole_name = entry.lower() in (known.lower() for known in models.class_names)
    if not name or not count.strip().isdecimal() or whole_name:
        return models.class_index(entry, "--labels"), None
    if int(count) < 1:
        raise BadInput(f"--labels holds {entry}; expected a count of at least 1.")
    return models.class_index(name.strip(), "--labels"), int(count)


def load_scorer(models: Models) -> Score:
    """What --scorer names. Raises: BadInput if there is no such function."""
    if SCORER.value is None:
        config = models.tokenizer.config
        emoji = open_source("emoji", "train", min(config.patch_nums[-1] * config.downsample, 64))
        if models.class_names != emoji.class_names:
            raise BadInput("--reject needs --scorer for this checkpoint; only the emoji have one.")
        return scorer(emoji)
    module, _, name = SCORER.value.partition(":")
    try:
        score = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"--scorer={SCORER.value} is no MODULE:FUNCTION here ({error}).") from error
    if not callable(score):
        raise BadInput(f"--scorer={SCORER.value} is no function.")
    return score  # type: ignore[return-value]


def claim(out: epath.Path, models: Models) -> epath.Path:
    """The folder of unfinished parts. Raises: BadInput if it holds parts of another command."""
    settings = {
        flag.name: flag.value
        for flag in (LABELS, NUM, SMOOTH, REJECT, SCORER, SEED, BATCH_SIZE, DTYPE)
    } | dataclasses.asdict(models.sampling)
    weights = fingerprint(models.tokenizer) + fingerprint(models.transformer)
    settings |= {"weights": weights, "top_p": models.sampling.listed}
    parts = out / "parts"
    about = parts / "settings.json"
    if about.exists() and any(parts.glob("*.npz")):
        found = json.loads(about.read_text())
        advice = "finish that, remove the folder, or name another --out."
        if found.get("weights") != weights:
            raise BadInput(f"{parts} holds an unfinished run of other weights; {advice}")
        for name, value in settings.items():
            if str(found.get(name)) != str(value):
                raise BadInput(
                    f"{parts} holds an unfinished run with --{name}={found.get(name)}, not {value};"
                    f" {advice}"
                )
    elif parts.exists() and any(
        not re.fullmatch(
            r"settings\.json|\.(settings\.json|(scores-)?\d{8,}\.npz)\.partial", path.name
        )
        for path in parts.iterdir()
    ):
        raise BadInput(f"{parts} was not made by this command; remove it or name another --out.")
    else:
        with replacing(about) as beside:
            beside.write_text(json.dumps(settings))
    return parts


def accepted(
    models: Models,
    labels: Int32[np.ndarray, " N"],
    index: Int32[np.ndarray, " M"],
    score: Score,
    parts: epath.Path,
) -> Int32[np.ndarray, " N"]:
    """Scores all candidates, batch by batch; for each label the position of the one kept."""
    wanted = labels[index % len(labels)]

    def judge(rows: slice, images: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        scores = np.asarray(score(images, wanted[rows]), np.float64)
        if (wrong := scores.shape != (len(images),)) or not np.isfinite(scores).all():
            what = f"shape {scores.shape}" if wrong else "numbers that are not finite"
            raise BadInput(f"--scorer returned {what}; expected one score for each image.")
        return {"scores": scores}

    paths = draw(models, wanted, index, parts, "scores-", "judging", judge)
    scores = np.concatenate([load_npz(path)["scores"] for path in paths])
    return best(scores, wanted, labels)


def sample_parts(
    models: Models,
    labels: Int32[np.ndarray, " N"],
    index: Int32[np.ndarray, " N"],
    parts: epath.Path,
) -> list[epath.Path]:
    """Writes every part that is not there yet."""

    def keep(rows: slice, images: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        part = {"arr_0": images, "labels": labels[rows]}
        return part if SMOOTH.value else part | {"tokens": tokens}  # Mixed codes are no tokens.

    return draw(models, labels, index, parts, "", "sampling", keep)


def draw(
    models: Models,
    labels: Int32[np.ndarray, " N"],
    index: Int32[np.ndarray, " N"],
    parts: epath.Path,
    prefix: str,
    doing: str,
    keep: Callable[[slice, np.ndarray, np.ndarray], dict[str, np.ndarray]],
) -> list[epath.Path]:
    """Draws batch by batch and writes what `keep` makes of each, unless it is there already."""
    count, size = len(labels), min(BATCH_SIZE.value, len(labels))
    paths = {start: parts / f"{prefix}{start:08d}.npz" for start in range(0, count, size)}
    left = [start for start, path in paths.items() if not path.exists()]
    done = count - sum(min(size, count - start) for start in left)
    with progress(count, done, doing) as bar:
        for start in left:
            rows = slice(start, min(start + size, count))
            images, tokens = next(
                generate(
                    models.transformer,
                    models.tokenizer,
                    labels[rows],
                    index=index[rows],
                    batch_size=size,
                    seed=SEED.value,
                    smooth=SMOOTH.value,
                    **models.sampling.arguments,
                )
            )
            save_npz(paths[start], **keep(rows, images, tokens))
            bar.update(len(images))
    return list(paths.values())


def first_rows(paths: list[epath.Path], name: str, count: int) -> Shaped[np.ndarray, "N ..."]:
    """The first `count` rows of an array that lies in parts."""
    needed = paths[: -(-count // BATCH_SIZE.value)]
    return np.concatenate([load_npz(path, name)[name] for path in needed])[:count]


def scales(models: Models, tokens: Int32[np.ndarray, "N L"]) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each image: what it looks like after each scale."""
    rows = coarse_to_fine(models.tokenizer, tokens)
    flat = rows.reshape(-1, *rows.shape[2:])
    return grid(flat, columns=rows.shape[1], scale=max(1, 96 // flat.shape[1]))


if __name__ == "__main__":
    cli.run(main)
