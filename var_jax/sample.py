"""Draws images from a checkpoint.

    python -m var_jax.sample --checkpoint emoji --labels "Smileys & Emotion" --num 24 --out samples

Writes samples.npz (`arr_0` uint8 N,H,W,3; `labels`; `tokens` int32 N,L) and grid.png. Image i comes
from the seed and i alone, not from batch size or devices; a stopped run goes on where it was.
"""

import io
import json

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Int32

from var_jax import BadInput
from var_jax.infra import cli
from var_jax.infra.logs import progress
from var_jax.infra.mesh import make_mesh
from var_jax.infra.pictures import grid, save_png
from var_jax.sampling.generate import generate
from var_jax.training.export import Models, load_models

CHECKPOINT = flags.DEFINE_string("checkpoint", None, 'A folder, or "emoji".', required=True)
LABELS = flags.DEFINE_list("labels", None, "Class numbers or names; default: all classes.")
NUM = flags.DEFINE_integer("num", None, "How many images in all, in turn over the labels.")
CFG = flags.DEFINE_float("cfg", 1.5, "Guidance: 0 is none.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 900, "Draw from the k likeliest codes; 0: all.", 0)
TOP_P = flags.DEFINE_float("top_p", 0.96, "Draw from this share of probability; 0: all.", 0, 1)
SMOOTH = flags.DEFINE_bool("smooth", False, "Mix codes: nicer to look at, not for metrics.")
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same images.", 0, 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.", 1)
OUT = flags.DEFINE_string("out", "samples", "Folder to write.")
SHOWN = 100  # images in grid.png


def main(argv: list[str]) -> None:
    """Samples in batches, each saved at once; joins them at the end."""
    cli.no_arguments(argv)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        models = load_models(CHECKPOINT.value, mesh)
        labels = wanted_labels(models.class_names)
        out = epath.Path(OUT.value)
        sample_parts(models, labels, claim(out))
    parts = [read(out / "parts" / name) for name in part_names(len(labels))]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    images = joined["arr_0"]
    show = min(len(images), SHOWN)
    scale = max(1, 96 // images.shape[1])
    save_png(out / "grid.png", grid(images[:show], columns=min(show, 10), scale=scale))
    write(out / "samples.npz", joined)
    (out / "parts").rmtree()
    print(
        f"{len(images)} images are in {out / 'samples.npz'}, the first {show} in {out / 'grid.png'}"
    )


def wanted_labels(class_names: tuple[str, ...]) -> Int32[np.ndarray, " N"]:
    """The class of each image. Raises: BadInput for a class that does not exist."""
    chosen = [class_index(label.strip(), class_names) for label in LABELS.value or ()]
    if not chosen and NUM.value is None:
        raise BadInput("say what to draw: --labels, --num or both.")
    chosen = chosen or list(range(len(class_names)))
    count = len(chosen) if NUM.value is None else NUM.value
    if count < 1:
        raise BadInput(f"--num={count}; expected at least 1.")
    return np.resize(np.array(chosen, np.int32), count)


def class_index(label: str, class_names: tuple[str, ...]) -> int:
    """A class by number or by name."""
    if label.lstrip("-").isdigit():
        if 0 <= int(label) < len(class_names):
            return int(label)
        raise BadInput(f"--labels holds {label}; classes are 0 to {len(class_names) - 1}.")
    found = [i for i, name in enumerate(class_names) if name.lower() == label.lower()]
    if not found:
        some = ", ".join(class_names[:12]) + (", ..." if len(class_names) > 12 else "")
        raise BadInput(f"--labels holds {label!r}; the classes of this checkpoint are {some}.")
    return found[0]


def claim(out: epath.Path) -> epath.Path:
    """The folder of unfinished parts. Raises: BadInput if it holds parts of another command."""
    settings = {
        flag.name: flag.value
        for flag in (CHECKPOINT, LABELS, NUM, CFG, TOP_K, TOP_P, SMOOTH, SEED, BATCH_SIZE)
    }
    parts = out / "parts"
    about = parts / "settings.json"
    if about.exists():
        found = json.loads(about.read_text())
        for name, value in settings.items():
            if found.get(name) != value:
                raise BadInput(
                    f"{parts} holds an unfinished run with --{name}={found.get(name)}, not {value};"
                    " finish that, remove the folder, or name another --out."
                )
    elif parts.exists() and any(path.suffix != ".partial" for path in parts.iterdir()):
        raise BadInput(f"{parts} was not made by this command; remove it or name another --out.")
    else:
        parts.mkdir(parents=True, exist_ok=True)
        beside = parts / "settings.json.partial"
        beside.write_text(json.dumps(settings))
        beside.replace(about)
    return parts


def sample_parts(models: Models, labels: Int32[np.ndarray, " N"], parts: epath.Path) -> None:
    """Writes every part that is not there yet."""
    names = part_names(len(labels))
    with progress(len(labels), 0, "sampling") as bar:
        for number, name in enumerate(names):
            first = number * BATCH_SIZE.value
            mine = labels[first : first + BATCH_SIZE.value]
            if not (parts / name).exists():
                made = generate(
                    models.transformer,
                    models.tokenizer,
                    mine,
                    batch_size=BATCH_SIZE.value,
                    seed=SEED.value,
                    first=first,
                    cfg=CFG.value,
                    top_k=TOP_K.value,
                    top_p=TOP_P.value,
                    smooth=SMOOTH.value,
                )
                images, tokens = next(made)
                part = {"arr_0": images, "labels": mine}
                # Mixed codes are no tokens.
                write(parts / name, part if SMOOTH.value else part | {"tokens": tokens})
            bar.update(len(mine))


def part_names(count: int) -> list[str]:
    """File names of the parts of `count` images."""
    return [f"{start:08d}.npz" for start in range(0, count, BATCH_SIZE.value)]


def write(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """An npz, written beside and renamed."""
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    beside = path.parent / f".{path.name}.partial"
    beside.write_bytes(data.getvalue())
    beside.replace(path)


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """All arrays of an npz."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        return dict(file)


if __name__ == "__main__":
    cli.run(main)
