"""Images for people: PNG files, grids of samples, labelled rows, line charts."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from var_jax.tools.files import replacing

GAP = 2
PAPER = 255
TINT = (255, 0, 128)
PHOTOGRAPH = 128  # pixels; smaller images are shown enlarged


class Images(np.ndarray):
    """A uint8 array (N, H, W, 3), (N, K, H, W, 3) or (H, W, 3) that a notebook shows as a grid."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return np.asarray(array)[()]  # what is computed from images is a plain array

    def _repr_png_(self) -> bytes | None:
        return self._encoded("PNG")

    def _repr_jpeg_(self) -> bytes | None:
        return self._encoded("JPEG")

    def _encoded(self, format: str) -> bytes | None:
        """The grid as PNG, or of photographs as JPEG: a notebook keeps what it shows."""
        if not (self.dtype == np.uint8 and self.ndim in (3, 4, 5) and self.shape[-1] == 3):
            return None
        if not self.size or format != ("PNG" if self.shape[-2] < PHOTOGRAPH else "JPEG"):
            return None
        images = np.asarray(self).reshape(-1, *self.shape[-3:])
        columns = self.shape[1] if self.ndim == 5 else min(len(images), 10)
        sheet = grid(images, columns, scale=max(1, 96 // images.shape[1]))
        data = io.BytesIO()
        Image.fromarray(sheet).save(data, format, quality=80)
        return data.getvalue()


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Around what is only to be looked at: an error is told in one line, and ends no run."""
    try:
        yield
    except Exception as error:  # fonts, settings of matplotlib, TensorBoard's files, a full disk
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(f"{what} cannot be written ({why}); going on without", file=sys.stderr, flush=True)


def save_png(path: str | PurePath, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes `image` as PNG; beside first, then renamed into place."""
    with replacing(path) as beside, beside.open("wb") as file:
        Image.fromarray(np.asarray(image)).save(file, format="PNG")


def grid(
    images: UInt8[np.ndarray, "N h w 3"], columns: int, pad: int = GAP, scale: int = 1
) -> UInt8[np.ndarray, "H W 3"]:
    """`images` row by row as one, each pixel `scale` wide."""
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    shape = (rows * (height + pad) - pad, columns * (width + pad) - pad, 3)
    sheet = np.full(shape, PAPER, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + pad), (i % columns) * (width + pad)
        sheet[y : y + height, x : x + width] = image
    return sheet


def before_and_after(
    image: UInt8[np.ndarray, "H W 3"],
    repaint: Bool[np.ndarray, "H W"],
    results: UInt8[np.ndarray, "N H W 3"],
) -> UInt8[np.ndarray, "M H W 3"]:
    """An edited image, the same with what is repainted tinted, and the results; M = N+2."""
    tinted = (image * 0.4 + np.array(TINT) * 0.6).astype(np.uint8)
    return np.stack([image, np.where(repaint[..., None], tinted, image), *results])


def labelled_rows(
    rows: dict[str, UInt8[np.ndarray, "N h w 3"]], scale: int = 1
) -> UInt8[np.ndarray, "H W 3"]:
    """One row of images for each name, which stands left of it."""
    strips = {name: grid(images, len(images), GAP * scale, scale) for name, images in rows.items()}
    height = max(strip.shape[0] for strip in strips.values())
    letters = min(max(height // 4, 12), 24)
    font = ImageFont.load_default(size=letters)
    margin = letters // 2
    text = max(round(font.getlength(name)) for name in strips) + 2 * margin
    width = text + max(strip.shape[1] for strip in strips.values())
    pitch = max(height, round(1.4 * letters)) + 2 * GAP * scale
    sheet = Image.new("RGB", (width, pitch * len(strips) - 2 * GAP * scale), (PAPER,) * 3)
    draw = ImageDraw.Draw(sheet)
    for i, (name, strip) in enumerate(strips.items()):
        middle = i * pitch + (pitch - 2 * GAP * scale) // 2
        draw.text((text - margin, middle), name, fill=(40, 40, 40), font=font, anchor="rm")
        sheet.paste(Image.fromarray(strip), (text, middle - strip.shape[0] // 2))
    return np.asarray(sheet)


def curves(
    path: str | PurePath,
    series: dict[str, dict[str, tuple]],
    x_label: str = "step",
) -> None:
    """Writes a PNG with one small line chart for each title: {title: {label: (x, y)}}.

    Many lines go from dark to light in their order.
    """
    figure, axes = charts(len(series))
    for axis, (title, lines) in zip(axes, series.items(), strict=False):
        if len(lines) > 5:
            from matplotlib import colormaps

            axis.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(lines))))
        for label, (x, y) in lines.items():
            if not len(x):
                continue  # the legend names what is drawn
            axis.plot(x, y, label=label, linewidth=1.6, marker="o" if len(x) < 12 else None, ms=3.5)
        axis.set(title=title, xlabel=x_label)
    save_charts(path, figure, axes)


def charts(count: int) -> tuple[Any, list[Any]]:
    """A matplotlib figure of `count` small charts, up to three in a row, and their axes."""
    # A notebook's name of a backend, of which nothing is drawn here, is unknown outside of it.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        os.environ |= {"MPLBACKEND": backend} if backend else {}

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def save_charts(path: str | PurePath, figure: Any, axes: list[Any]) -> None:
    """Writes a figure of `charts` as PNG, all in one style."""
    handles, names = axes[0].get_legend_handles_labels()
    shared = len(axes) > 1 and all(axis.get_legend_handles_labels()[1] == names for axis in axes)
    if shared and len(names) > 1:
        figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8)
    for axis in axes:
        axis.set_title(axis.get_title(), fontsize=11, loc="left")
        axis.set_title("")
        axis.xaxis.label.set_size(9)
        axis.tick_params(which="both", labelsize=8, length=0)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("0.7")
        if not shared and (lines := len(axis.get_legend_handles_labels()[0])) > 1:
            axis.legend(frameon=False, fontsize=8, ncols=1 + lines // 8)
    with replacing(path) as beside, beside.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
