"""Repaints part of an image: in-painting, out-painting, editing by class (VAR, appendix B).

    python -m var_jax.edit --checkpoint emoji --image P.png --task inpaint --box .25,.25,.75,.75

inpaint repaints inside the box and outpaint outside it, for no class or for --label; class repaints
inside it as --label. --mask, an image, says freely what to repaint: white. Any image will do: its
shorter edge is resized to the model's size (Lanczos) and its centre cropped; the box is in
fractions of the crop, the mask is cropped alike. Writes result.png (or result_0.png ...), strip.png
(input, what is repainted, results) and edit.npz (`arr_0` uint8 N,H,W,3; `tokens` int32 N,L; `keep`
L: 1 if kept).
"""

import re

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Bool
from PIL import Image

import var_jax
from var_jax import BadInput
from var_jax.api import MOST_EDITS
from var_jax.config import MAX_SEED
from var_jax.data.decoding import crop
from var_jax.sampling.arguments import read_image
from var_jax.sampling.masks import Box, as_box, box_mask, enlarge_mask, pool_mask
from var_jax.schedule import name_of
from var_jax.sharding.mesh import data_mesh
from var_jax.tools import cli, sampling_flags
from var_jax.tools.files import output_folder
from var_jax.tools.images import before_and_after, grid, save_png
from var_jax.tools.npz import save_npz


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, 'A folder, "emoji" or "hub:d16".', required=True)
    flags.DEFINE_string(
        "image",
        None,
        "An image file; its shorter edge is resized to the model's size and its centre cropped.",
        required=True,
    )
    flags.DEFINE_enum(
        "task",
        "inpaint",
        ["inpaint", "outpaint", "class"],
        "inpaint: repaint inside --box; outpaint: outside; class: inside, as --label.",
    )
    flags.DEFINE_list("box", None, "y0,x0,y1,x1, each from 0 to 1 of the cropped image.")
    flags.DEFINE_string(
        "mask",
        None,
        "Instead of --box, an image of the shape of --image, white where to repaint: a cell of the"
        " finest scale is repainted where its mean brightness is at least half.",
    )
    flags.DEFINE_string("label", None, "A class number or name to paint.")
    flags.DEFINE_integer("num", 1, "How many results.", 1, MOST_EDITS)
    flags.DEFINE_bool("paste", False, "Put the input's pixels back outside the mask.")
    sampling_flags.define_sampling()
    flags.DEFINE_bool("smooth", False, "Mix codes, which is nicer to look at.")
    flags.DEFINE_integer("seed", 0, "Same seed, same results.", 0, MAX_SEED)
    flags.DEFINE_integer("batch_size", 8, "Results at a time.", 1)
    flags.DEFINE_string("out", "edited", "Folder to write.")


def main(args: flags.FlagValues) -> None:
    """Reads, edits, then writes."""
    box = read_box(args)
    original = read_image(args.image, "--image")
    mask = read_mask(args.mask, original) if box is None else None
    out = output_folder(args.out)
    model = var_jax.load(args.checkpoint, mesh=data_mesh())
    model.check_kind("editing", "var")
    image = crop(original, model.image_size, resize=1)
    repaint, pixels = areas(args, model, box, mask)
    settings = model.settings(**sampling_flags.sampling_settings(args))
    if args.label is not None:
        model.class_index(args.label, "--label")
    samples, keep = model.edit_tokens(
        image, repaint, label=args.label, num=args.num, seed=args.seed, smooth=args.smooth,
        batch_size=min(args.batch_size, args.num), settings=settings,
    )  # fmt: skip
    results = np.where(pixels[..., None], samples.images, image) if args.paste else samples.images
    arrays = {"arr_0": results, "keep": keep.astype(np.int32)}
    if not args.smooth:  # mixed codes are no tokens
        arrays["tokens"] = samples.tokens
    write(out, before_and_after(image, pixels, results), arrays)


def read_box(args: flags.FlagValues) -> Box | None:
    """The box, if that is given. Raises: BadInput for flags that do not fit together."""
    if (args.box is None) == (args.mask is None):
        raise BadInput("say what to repaint: either --box or --mask.")
    if args.task == "class" and args.label is None:
        raise BadInput("--task=class needs --label, the class to paint.")
    if args.cfg and args.label is None:
        raise BadInput(f"--cfg={args.cfg:g} strengthens the class of --label, which is not given.")
    if args.box is None:
        if args.task == "outpaint":
            raise BadInput("--task=outpaint goes with --box; what --mask has white is repainted.")
        return None
    return as_box(f"--box={','.join(args.box)}", cli.numbers("--box", args.box) or ())


def read_mask(path: str, image: Image.Image) -> Image.Image:
    """A mask for `image`. Raises: BadInput if it is transparent, or of another shape."""
    mask, on_black = (read_image(path, "--mask", b).convert("L") for b in ("white", "black"))
    if mask.tobytes() != on_black.tobytes():
        raise BadInput(
            f"--mask={path} is transparent in places, which may mean to repaint or to keep them;"
            " give an opaque image, white where to repaint."
        )
    if mask.getextrema()[1] == 1:  # of zeros and ones
        mask = mask.point(lambda value: 255 * value)
    mask = mask.convert("RGB")
    (w, h), (W, H) = mask.size, image.size
    if abs(w * H - h * W) > max(W, H, w, h):  # as far as rounding to whole pixels goes
        raise BadInput(f"--mask is {w} x {h} pixels, --image {W} x {H}: expected the same shape.")
    return mask


def areas(
    args: flags.FlagValues, model: var_jax.Model, box: Box | None, mask: Image.Image | None
) -> tuple[Bool[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
    """What to repaint, snapped to cells of the finest scale, and as it was given, in pixels.

    Raises: BadInput if nothing is left.
    """
    size, cells = model.image_size, model.patch_nums[-1]
    if mask is not None:
        bright = crop(mask, size, 1, resample=Image.Resampling.BOX)[..., 0] / 255
        snapped = pool_mask(bright, cells)
        pixels = bright >= 0.5
    else:
        assert box is not None
        snapped, pixels = box_mask(box, cells), box_mask(box, size)
    if args.task == "outpaint":
        snapped, pixels = ~snapped, ~pixels
    if not snapped.any():
        flag = "mask" if mask is not None else "box"
        raise BadInput(f"--{flag} leaves nothing to repaint on the {name_of(cells)} cells.")
    if mask is not None and snapped.all():
        print("the mask is white in all cells: the whole image is repainted")
    snapped = enlarge_mask(snapped, size)
    return snapped, pixels if args.paste else snapped


def write(out: epath.Path, strip: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    """The results, each by itself and all beside the input."""
    results = arrays["arr_0"]
    names = [f"result_{i}.png" for i in range(len(results))] if len(results) > 1 else ["result.png"]
    for name, result in zip(names, results, strict=True):
        save_png(out / name, result)
    for path in out.glob("result*.png"):  # of an edit before this
        if path.name not in names and re.fullmatch(r"result(_\d+)?\.png", path.name):
            path.unlink()
    sheet = grid(strip, columns=min(len(strip), 10), scale=max(1, 96 // strip.shape[1]))
    save_png(out / "strip.png", sheet)
    save_npz(out / "edit.npz", **arrays)
    some = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    print(f"{some}, strip.png and edit.npz are in {out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
