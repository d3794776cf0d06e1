"""Samples images from a checkpoint.

    python -m var_jax.sample --checkpoint emoji --labels "Smileys & Emotion" --num 24 --out samples

Writes samples.npz (`arr_0` uint8 N,H,W,3; `labels`; `tokens` int32 N,L, if the model has any) and
grid.png. Image i comes
from the seed and i alone, not from batch size or devices; a stopped run continues. Disk holds all
images twice at the end, memory one batch. With --distributed each of several hosts that share the
folder samples and writes its part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Int32, UInt8

import var_jax
from var_jax import BadInput
from var_jax.checkpoints.export import load_fingerprint
from var_jax.config import MAX_SEED, SamplingConfig
from var_jax.data.classes import class_index, meanings
from var_jax.data.sources.emoji import CELL, Emoji
from var_jax.evaluation.likelihood import class_scores
from var_jax.evaluation.pixel_report import scorer
from var_jax.sampling.exports import mesh_for_sampling
from var_jax.sampling.to_disk import Job, Score
from var_jax.schedule import num_tokens, shape_of
from var_jax.sharding import hosts
from var_jax.sharding.mesh import of_first, using
from var_jax.tools import cli, sampling_flags
from var_jax.tools.files import output_folder
from var_jax.tools.images import grid, save_png
from var_jax.tools.plugins import describe, find_function

MOST = 10**8  # images; of those parts the names have room for
SHOWN, ROWS = 100, 8  # images in grid.png and in scales.png
SETTINGS = ("labels", "num", "smooth", "reject", "scorer", "seed", "dtype", "draft_scales")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, 'A folder, "emoji" or "hub:d16".', required=True)
    flags.DEFINE_list(
        "labels",
        None,
        "Class numbers or names, each with a count if you like: 207:50,88:10. Default: all classes."
        " A name that is also another class's number is said as name=1, the number as number=1."
        " An entry with a comma in its name goes in double quotes:"
        " --labels '\"tench, Tinca:50\",88:10'.",
    )
    flags.DEFINE_integer(
        "num", None, "How many images, in turn over the labels; the first get one more if need be."
    )
    sampling_flags.define_sampling()
    sampling_flags.define_solver()
    sampling_flags.define_schedule()
    flags.DEFINE_string(
        "refiner",
        None,
        "A checkpoint of a smaller transformer, which samples the scales after --draft_scales:"
        " collaborative decoding (CoDe).",
    )
    flags.DEFINE_integer("draft_scales", None, "How many scales --checkpoint samples then.", 1)
    flags.DEFINE_bool("smooth", False, "Mix codes: nicer to look at, not for metrics.")
    flags.DEFINE_float(
        "reject", 1.0, "Draw more and keep this share of each class, the best by --scorer.", 1e-4, 1
    )
    flags.DEFINE_string(
        "scorer",
        None,
        "MODULE:FUNCTION that takes images (uint8 N,H,W,3) and labels (N) and returns N scores,"
        " higher is better. Default: log p(tokens | class) - log p(tokens) by the model itself; for"
        " the emoji a classifier fitted on them.",
    )
    flags.DEFINE_integer("seed", 0, "Same seed, same images.", 0, MAX_SEED)
    flags.DEFINE_integer("batch_size", 64, "Images at a time, of all devices together.", 1)
    flags.DEFINE_integer(
        "fsdp",
        None,
        "Number of devices to split the transformer's weights over. Default: as trained.",
        1,
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "What the transformer computes in; bfloat16 also halves its weights in memory. auto: as the"
        " checkpoint says, which by default is bfloat16 on accelerators and float32 on CPU.",
    )
    flags.DEFINE_bool(
        "show_scales",
        False,
        "Also write scales.png: the first images after each scale.",
    )
    flags.DEFINE_string("out", "samples", "Folder to write.")
    hosts.define_flags()


def main(args: flags.FlagValues) -> None:
    """Samples in batches, each saved at once; joins them at the end."""
    if args.show_scales and args.smooth:
        raise BadInput("--show_scales needs tokens, and --smooth mixes them; give one of the two.")
    hosts.join(args)
    out = output_folder(args.out, locks=jax.process_index() == 0)  # for all hosts
    hosts.check_shared("--out", out)
    mesh = mesh_for_sampling(args.checkpoint, args.fsdp)
    model = var_jax.load(args.checkpoint, mesh=mesh, dtype=args.dtype)
    if args.patch_nums is not None:
        if args.refiner:
            raise BadInput("--patch_nums does not go with --refiner; give one of the two.")
        model = model.at_schedule(sampling_flags.schedule(args.patch_nums))
    refiner = model.load_refiner(args.refiner, dtype=args.dtype) if args.refiner else None
    if args.show_scales:
        model.check_kind("--show_scales", "var")
    labels = wanted_labels(args, model)
    score, everywhere = load_scorer(args, model) if args.reject < 1 else (None, False)
    settings = model.settings(
        **sampling_flags.sampling_settings(args), steps=args.steps, solver=args.solver
    )
    sampler, weights = model.sampler(settings, args.smooth, refiner, args.draft_scales)
    job = Job(
        sampler, weights, labels, out, args.batch_size, args.seed, with_tokens=not args.smooth
    )
    with using(mesh):
        job.begin(settings_of(args, model, settings, refiner))
        index = np.arange(len(labels), dtype=np.int32)
        if score is not None:
            index = job.choose(args.reject, score, everywhere)
        job.sample(index)
        if args.show_scales:
            shape = min(ROWS, len(labels)), num_tokens(model.patch_nums)
            tokens = of_first(lambda: job.rows("tokens", shape[0]), shape, np.int32)
            image = scales(model, tokens)
        if jax.process_index() == 0:
            if args.show_scales:
                save_png(out / "scales.png", image)
            finish(job)
        sync_global_devices("samples are joined")  # hosts that end earlier would take others along


def finish(job: Job) -> None:
    """Writes grid.png and samples.npz."""
    count, path = len(job.labels), job.out / "grid.png"
    images = job.rows("arr_0", min(SHOWN, count))
    scale = max(1, 96 // images.shape[1])
    save_png(path, grid(images, columns=min(len(images), 10), scale=scale))
    are = "1 image is" if count == 1 else f"{count} images are"
    print(f"{are} in {job.finish()}, the first {len(images)} in {path}")


def wanted_labels(args: flags.FlagValues, model: var_jax.Model) -> Int32[np.ndarray, " N"]:
    """The class of each image. Raises: BadInput for a class that does not exist."""
    if not args.labels and args.num is None:
        raise BadInput("say what to draw: --labels, --num or both.")
    entries = [counted(entry.strip(), model.class_names) for entry in args.labels or ()]
    chosen = np.array([i for i, _ in entries] or range(len(model.class_names)), np.int32)
    if any(count is not None for _, count in entries):
        if args.num is not None:
            raise BadInput(f"--labels holds counts, so --num={args.num} has no place.")
        counts = [1 if count is None else count for _, count in entries]
        check_count(f"--labels asks for {sum(counts)} images", sum(counts), args.reject)
        return np.repeat(chosen, counts)
    count = len(chosen) if args.num is None else args.num
    check_count(f"--num={count}", count, args.reject)
    return np.resize(chosen, count)


def check_count(what: str, count: int, keep: float) -> None:
    """Raises BadInput for more images than a folder of parts has room for."""
    if not 1 <= count <= MOST:
        raise BadInput(f"{what}; expected 1 to {MOST}.")
    if count > MOST * keep:
        raise BadInput(
            f"--reject={keep} draws {count / keep:.0f} images for {count}; expected at most {MOST}."
        )


def counted(entry: str, names: Sequence[str]) -> tuple[int, int | None]:
    """Class and count of "class" or "class:count"; a name may hold colons itself."""
    name, _, count = entry.rpartition(":")
    name, count = name.strip(), count.strip()
    if not (name and count.isdecimal()):
        return class_index(names, entry, "--labels"), None
    if meanings(names, entry):
        if found := meanings(names, name):
            raise BadInput(
                f"--labels holds {entry!r}, which may mean the class of this name (say {entry}:1)"
                f" or {count} of {name!r} (say number={found[0]}:{count})."
            )
        return class_index(names, entry, "--labels"), None
    if not 1 <= int(count[:12]) <= MOST:
        raise BadInput(f"--labels holds {entry[:60]}; expected a count of 1 to {MOST}.")
    return class_index(names, name, "--labels"), int(count)


def load_scorer(args: flags.FlagValues, model: var_jax.Model) -> tuple[Score, bool]:
    """What --scorer names, or else a classifier of the emoji or the model itself.

    And whether it takes all images on every process, as the model does.

    Raises: BadInput if there is no such function, or the model would need tokens that are not here.
    """
    if args.scorer is not None:
        return of_user(find_function("--scorer", args.scorer, 2), args.scorer), False
    size = model.image_size
    emoji = Emoji("train", size if max(shape_of(size)) <= CELL else CELL)
    if model.class_names == emoji.class_names:
        return of_images(scorer(emoji)), False
    model.check_kind("--reject without --scorer", "var", "raster")
    if args.smooth:
        raise BadInput("--reject needs --scorer here: the model scores tokens, --smooth has none.")
    parts = model.models.tokenizer.quantizer, model.models.transformer
    return lambda _, labels, tokens: class_scores(*parts, tokens, labels, args.batch_size), True


def of_user(score: Callable[[np.ndarray, np.ndarray], Any], spec: str) -> Score:
    """The score of --scorer. It raises BadInput where that fails or returns no real numbers."""

    def checked(images: np.ndarray, labels: np.ndarray, _: Any) -> np.ndarray:
        try:
            scores = np.asarray(score(images, labels))
            if scores.dtype.kind in "cSU":
                raise TypeError(f"{scores.dtype} is no kind of real numbers")
            return scores.astype(np.float64)
        except Exception as error:  # whatever the user's code does
            raise BadInput(f"--scorer={spec} failed with {describe(error)}.") from error

    return checked


def of_images(score: Callable[[np.ndarray, np.ndarray], Any]) -> Score:
    """A score of images and labels, whatever the tokens."""
    return lambda images, labels, _: score(images, labels)


def settings_of(
    args: flags.FlagValues,
    model: var_jax.Model,
    settings: SamplingConfig,
    refiner: var_jax.Model | None,
) -> dict[str, Any]:
    """What must be the same where a stopped run continues."""
    parts = {"tokenizer": model.models.tokenizer, "transformer": model.models.transformer}
    weights = "".join(load_fingerprint(args.checkpoint, n, part) for n, part in parts.items())
    if refiner is not None:
        weights += load_fingerprint(args.refiner, "transformer", refiner.models.transformer)
    flag_values = {name: args[name].value for name in SETTINGS}
    flag_values["patch_nums"] = None if args.patch_nums is None else str(model.patch_nums)
    return flag_values | settings.flags(model.kind) | {"weights": weights}


def scales(model: var_jax.Model, tokens: Int32[np.ndarray, "N L"]) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each image: what it looks like after each scale."""
    rows = model.coarse_to_fine(tokens)
    flat = rows.reshape(-1, *rows.shape[2:])
    return grid(flat, columns=rows.shape[1], scale=max(1, 96 // flat.shape[1]))


if __name__ == "__main__":
    cli.run(main, define_flags)
