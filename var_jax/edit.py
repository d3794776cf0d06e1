"""Repaints part of a picture: in-painting, out-painting, class-conditional editing (VAR §5.3).

    python -m var_jax.edit --checkpoint emoji --image P.png --task inpaint --box .25,.25,.75,.75

The picture becomes tokens; those to keep are forced, the others drawn. inpaint repaints inside the
box and outpaint outside it, for no class or for --label; class repaints inside it as --label.
--mask, an image, says freely what to repaint: white. Any picture will do: its shorter edge is
resized to the model's size (Lanczos) and its centre cropped; the box is in fractions of the crop,
the mask is cropped alike. Writes result.png (or result_0.png ...), strip.png (input, what is
repainted, results) and edit.npz (`arr_0` uint8 N,H,W,3; `tokens` int32 N,L; `keep` L: 1 if kept).
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Bool, UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.checkpoints.export import Models, load_models
from var_jax.data.decoding import Unreadable, crop, decode
from var_jax.data.token_cache import encode
from var_jax.sampling.autoregressive import Forced
from var_jax.sampling.generate import generate
from var_jax.sampling.masks import Box, box_mask, kept_tokens, pool_mask
from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.ops import BATCH, pin, round_up
from var_jax.tools import cli
from var_jax.tools.images import grid, save_png
from var_jax.tools.npz import save_npz

CHECKPOINT = flags.DEFINE_string("checkpoint", None, 'A folder, or "emoji".', required=True)
IMAGE = flags.DEFINE_string(
    "image",
    None,
    "Any image file; the shorter edge is resized to the model's size and the centre cropped.",
    required=True,
)
TASK = flags.DEFINE_enum(
    "task",
    "inpaint",
    ["inpaint", "outpaint", "class"],
    "inpaint: repaint inside --box; outpaint: outside; class: inside, as --label.",
)
BOX = flags.DEFINE_list("box", None, "y0,x0,y1,x1, each from 0 to 1 of the cropped picture.")
MASK = flags.DEFINE_string(
    "mask",
    None,
    "Instead of --box, an image of the shape of --image, white where to repaint: a cell of the"
    " finest scale is repainted where its mean brightness is at least half.",
)
LABEL = flags.DEFINE_string("label", None, "A class number or name to paint.")
NUM = flags.DEFINE_integer("num", 1, "How many results.", 1)
PASTE = flags.DEFINE_bool("paste", False, "Put the input's pixels back outside the mask.")
CFG, TOP_K, TOP_P = cli.sampling_flags()
SMOOTH = flags.DEFINE_bool("smooth", False, "Mix codes, which is nicer to look at.")
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same results.", 0, 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Results at a time.", 1)
OUT = flags.DEFINE_string("out", "edited", "Folder to write.")
TINT = (255, 0, 128)  # of what is repainted, in strip.png
LARGEST = 1024  # side of what any model paints; larger pictures may be read reduced


def main(argv: list[str]) -> None:
    """Reads, edits, then writes."""
    cli.no_arguments(argv)
    box = check_flags()
    original = read("--image", IMAGE.value)
    region = read_mask(str(MASK.value), original) if box is None else box
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        models = load_models(CHECKPOINT.value, mesh)
        models = models.drawn(CFG.value, TOP_K.value, TOP_P.value)
        cells = models.tokenizer.config.patch_nums[-1]
        image = crop(original, cells * models.tokenizer.config.downsample, resize=1)
        repaint, pixels = areas(region, cells, len(image))
        if not repaint.any():
            flag = "mask" if box is None else "box"
            raise BadInput(f"--{flag} leaves nothing to repaint on the {cells} x {cells} cells.")
        label = models.transformer.config.num_classes  # no class
        if LABEL.value is not None:
            label = models.class_index(LABEL.value, "--label")
        arrays = edit(models, image, repaint, label)
    if PASTE.value:
        arrays["arr_0"] = np.where(pixels[..., None], arrays["arr_0"], image)
        repaint = pixels
    write(epath.Path(OUT.value), image, repaint, arrays)


def check_flags() -> Box | None:
    """The box, if that is given. Raises: BadInput for flags that do not fit together."""
    if (BOX.value is None) == (MASK.value is None):
        raise BadInput("say what to repaint: either --box or --mask.")
    if TASK.value == "class" and LABEL.value is None:
        raise BadInput("--task=class needs --label, the class to paint.")
    if BOX.value is None:
        if TASK.value == "outpaint":
            raise BadInput("--task=outpaint goes with --box; what --mask has white is repainted.")
        return None
    wrong = BadInput(
        f"--box={','.join(BOX.value)}; expected y0,x0,y1,x1 with 0 <= y0 < y1 <= 1 and"
        " 0 <= x0 < x1 <= 1."
    )
    try:
        y0, x0, y1, x1 = (float(edge) for edge in BOX.value)
    except ValueError as error:
        raise wrong from error
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise wrong
    return y0, x0, y1, x1


def read(flag: str, path: str) -> Image.Image:
    """An image file. Raises: BadInput if it cannot be read."""
    try:
        return decode(epath.Path(path).read_bytes(), LARGEST)
    except OSError as error:
        raise BadInput(f"{flag}={path} cannot be read: {error.strerror or error}.") from error
    except Unreadable as error:
        raise BadInput(f"{flag}={path} cannot be read: {error}.") from error


def read_mask(path: str, image: Image.Image) -> Image.Image:
    """A mask for `image`. Raises: BadInput if it has another shape."""
    mask = read("--mask", path).convert("L").convert("RGB")
    (w, h), (W, H) = mask.size, image.size
    if abs(w * H - h * W) > max(W, H, w, h):  # as far as rounding to whole pixels goes
        raise BadInput(f"--mask is {w} x {h} pixels, --image {W} x {H}: expected the same shape.")
    return mask


def areas(
    region: Box | Image.Image, cells: int, side: int
) -> tuple[Bool[np.ndarray, "cells cells"], Bool[np.ndarray, "side side"]]:
    """What to repaint, in cells of the finest scale and in pixels."""
    if isinstance(region, Image.Image):
        brightness = crop(region, side, 1, resample=Image.Resampling.BOX)[..., 0] / 255
        return pool_mask(brightness, cells), brightness >= 0.5
    flip = TASK.value == "outpaint"
    return box_mask(region, cells) ^ flip, box_mask(region, side) ^ flip


def edit(
    models: Models,
    image: UInt8[np.ndarray, "H W 3"],
    repaint: Bool[np.ndarray, "side side"],
    label: int,
) -> dict[str, np.ndarray]:
    """What edit.npz holds."""
    tokenizer, config = models.tokenizer, models.transformer.config
    several = pin(jnp.asarray(np.stack([image] * round_up(1))), BATCH)
    tokens = np.asarray(encode(tokenizer, several))[0]
    keep = kept_tokens(repaint, config.patch_nums)
    each = lambda row: jnp.asarray(np.stack([row] * NUM.value))
    how = models.sampling.arguments
    if label == config.num_classes:  # Guidance from no class to no class changes nothing.
        how |= {"cfg": None}
    made = generate(
        models.transformer,
        tokenizer,
        np.full(NUM.value, label, np.int32),
        batch_size=min(BATCH_SIZE.value, NUM.value),
        seed=SEED.value,
        forced=Forced(each(tokens), each(keep)),
        smooth=SMOOTH.value,
        **how,
    )
    images, drawn = (np.concatenate(part) for part in zip(*made, strict=True))
    arrays = {"arr_0": images, "keep": keep.astype(np.int32)}
    return arrays if SMOOTH.value else arrays | {"tokens": drawn}  # Mixed codes are no tokens.


def write(
    out: epath.Path,
    image: UInt8[np.ndarray, "H W 3"],
    repaint: Bool[np.ndarray, "side side"],
    arrays: dict[str, np.ndarray],
) -> None:
    """The results, each by itself and all beside the input."""
    results, scale = arrays["arr_0"], len(image) // len(repaint)
    tinted = repaint.repeat(scale, 0).repeat(scale, 1)[..., None]
    shown = np.where(tinted, (image * 0.4 + np.array(TINT) * 0.6).astype(np.uint8), image)
    strip = np.stack([image, shown, *results])
    names = [f"result_{i}.png" for i in range(len(results))] if len(results) > 1 else ["result.png"]
    for name, result in zip(names, results, strict=True):
        save_png(out / name, result)
    enlarged = grid(strip, columns=min(len(strip), 10), scale=max(1, 96 // len(image)))
    save_png(out / "strip.png", enlarged)
    save_npz(out / "edit.npz", **arrays)
    some = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    print(f"{some}, strip.png and edit.npz are in {out}")


if __name__ == "__main__":
    cli.run(main)
