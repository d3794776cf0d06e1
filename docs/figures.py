"""Makes the figures of the documentation from the checkpoint in the package.

python docs/figures.py [--out docs/images]
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

import var_jax
from var_jax.schedule import Pattern, level_ids, slices
from var_jax.tools.images import labelled_rows, save_png

LABELS = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Travel & Places", "Activities",
    "Symbols", "Flags",
)  # fmt: skip
TIMES = "\N{MULTIPLICATION SIGN}"
SEED = 3  # of the samples: one that gives recognizable images


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a small PNG."""
    figure.savefig(path, dpi=110)
    reduce(path)


def reduce(path: Path) -> None:
    """Leaves a PNG 128 colours: a quarter of the bytes."""
    image = Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def show(axis, image, title="") -> None:
    """One image without axes."""
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def scales(model: var_jax.Model, out: Path) -> None:
    """A sample of each of some classes, after each scale."""
    tokens = model.sample_tokens(list(LABELS), seed=SEED)
    rows = model.coarse_to_fine(tokens)
    save_png(out / "scales.png", labelled_rows(dict(zip(LABELS, rows, strict=True)), scale=2))
    reduce(out / "scales.png")


def tokens(model: var_jax.Model, out: Path) -> None:
    """Residual multi-scale tokens: the codes of each scale, and the sum so far as an image."""
    codes = model.sample_tokens(["People & Body"], seed=SEED)
    images = model.coarse_to_fine(codes)[0]
    patch_nums = model.patch_nums
    hue = np.random.default_rng(0).permutation(model.models.tokenizer.config.vocab_size)
    colours = colormaps["turbo"](hue / len(hue))[:, :3]
    figure = Figure(figsize=(len(patch_nums) * 0.85, 2.2), layout="constrained")
    axes = figure.subplots(2, len(patch_nums))
    for k, here in enumerate(slices(patch_nums)):
        side = patch_nums[k]
        show(axes[0, k], colours[codes[0, here]].reshape(side, side, 3), f"{side}{TIMES}{side}")
        show(axes[1, k], images[k])
    for row, text in ((0, "codes of the scale"), (1, "sum so far")):
        axes[row, 0].text(-0.25, 0.5, text, rotation=90, ha="center", va="center", fontsize=8,
                          transform=axes[row, 0].transAxes)  # fmt: skip
    save(figure, out / "tokens.png")


def mask(out: Path) -> None:
    """The block-causal mask of the scales 1, 2, 3, 4."""
    patch_nums = (1, 2, 3, 4)
    seen, level = Pattern.block_causal(patch_nums).mask(), level_ids(patch_nums)
    figure = Figure(figsize=(4.2, 3.9), layout="constrained")
    axis = figure.subplots()
    shades = colormaps["viridis"](0.25 + 0.65 * level / level.max())[:, :3]
    axis.imshow(np.where(seen[..., None], shades[None, :], 0.94), interpolation="nearest")
    middles = [(here.start + here.stop - 1) / 2 for here in slices(patch_nums)]
    names = [f"{side}{TIMES}{side}" for side in patch_nums]
    axis.set_xticks(middles, names, fontsize=8)
    axis.set_yticks(middles, names, fontsize=8)
    for here in slices(patch_nums)[:-1]:
        axis.axhline(here.stop - 0.5, color="white", linewidth=1.5)
        axis.axvline(here.stop - 0.5, color="white", linewidth=1.5)
    axis.set_xlabel("key: a token of scale", fontsize=9)
    axis.set_ylabel("query: a token of scale", fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    save(figure, out / "mask.png")


def teacher_forcing(model: var_jax.Model, out: Path) -> None:
    """What the transformer reads at each scale, and what it has to predict there."""
    codes = model.sample_tokens(["Animals & Nature"], seed=SEED)
    images, patch_nums = model.coarse_to_fine(codes)[0], model.patch_nums
    grown = [k for k in range(1, len(patch_nums)) if patch_nums[k] > patch_nums[k - 1]]
    chosen = (0, *grown, len(patch_nums) - 1)
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots(2, len(chosen))
    for column, k in enumerate(chosen):
        side = patch_nums[k]
        title = f"scale {k + 1}: {side}{TIMES}{side}"
        before = Image.fromarray(images[k - 1]).resize((side, side), Image.Resampling.BOX)
        show(axes[0, column], before if k else np.ones((1, 1, 3)), title)
        show(axes[1, column], images[k])
    axes[0, 0].text(0, 0, "class", ha="center", va="center", fontsize=10)
    for row, text in ((0, "input"), (1, "with the\npredicted scale")):
        axes[row, 0].text(-0.2, 0.5, text, rotation=90, ha="center", va="center", fontsize=9,
                          transform=axes[row, 0].transAxes)  # fmt: skip
    save(figure, out / "teacher_forcing.png")


def guidance(model: var_jax.Model, out: Path) -> None:
    """The guidance scale over the scales, and the same seeds under more and more guidance."""
    strengths, K = (0.0, 1.5, 4.0), len(model.patch_nums)
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    chart, samples = figure.subplots(1, 2, width_ratios=(1, 2.6))
    for cfg in strengths:
        rising = cfg * np.arange(K) / (K - 1)
        chart.plot(np.arange(1, K + 1), rising, marker="o", ms=3, label=f"{cfg:g}")
    chart.set_xlabel("scale", fontsize=9)
    chart.set_ylabel("guidance t", fontsize=9)
    chart.tick_params(labelsize=8)
    chart.legend(title="cfg", fontsize=8, title_fontsize=8, frameon=False)
    chart.spines[["top", "right"]].set_visible(False)
    labels = [label for label in LABELS[:4] for _ in range(2)]
    rows = {f"cfg {cfg:g}": model.sample(labels, seed=SEED, cfg=cfg) for cfg in strengths}
    show(samples, labelled_rows(rows, scale=2))
    save(figure, out / "guidance.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = var_jax.load("emoji")
    scales(model, out)
    tokens(model, out)
    mask(out)
    teacher_forcing(model, out)
    guidance(model, out)


if __name__ == "__main__":
    main()
