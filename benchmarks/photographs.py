"""Photographs at 256 px with and without LPIPS and a discriminator, at equal steps.

    pip install -e '.[lpips]' scikit-image
    python benchmarks/photographs.py --out runs/photographs

Crops of six photographs that come with scikit-image: astronaut, rocket and hubble_deep_field
(public domain), chelsea, coffee and retina (CC0). The right 256 columns of each are held out,
chelsea, which is narrow, as a whole. One tokenizer is trained on squared error; then its decoder
alone goes on from there three times, for as many steps: with squared error, with LPIPS beside it,
and with LPIPS and a PatchGAN. A stopped command goes on. Writes table.md (PSNR, LPIPS of held-out
crops) and photographs.png: originals, then the three.
"""

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import UInt8
from kept import kept

from var_jax import BadInput
from var_jax.config import Config, defaults, from_dict, settings
from var_jax.evaluation.scores import psnr
from var_jax.evaluation.tokenizer import similarities
from var_jax.models.features.lpips import load_lpips
from var_jax.models.tokenizer import decode_tokens, encode_images
from var_jax.sampling.exports import load_tokenizer
from var_jax.sharding.mesh import using
from var_jax.sharding.rows import in_batches
from var_jax.tools import cli
from var_jax.tools.files import output_path, replacing
from var_jax.tools.images import grid, save_png
from var_jax.tools.npz import load_npz, save_npz
from var_jax.training.run import train

NAMES = ("astronaut", "rocket", "hubble_deep_field", "chelsea", "coffee", "retina")
SIZE, HELD_OUT, CROPS = 256, 3, 48  # pixels; crops of each photograph, held out and trained on
LOSSES = {
    "L2": {},
    "L2 + LPIPS": {"lpips_weight": 1.0},
    "L2 + LPIPS + GAN": {"lpips_weight": 1.0, "gan": {"weight": 0.4, "learning_rate": 1.3e-2}},
}


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("out", "runs/photographs", "Folder of the crops, the runs and the figures.")
    flags.DEFINE_integer("first_steps", 1500, "Of the training on squared error alone.", 1)
    flags.DEFINE_integer("steps", 150, "Of each of the three that follow.", 1)


def main(args: flags.FlagValues) -> None:
    """Trains what is missing, and compares."""
    out = output_path(args.out)
    perceptual = {f"lpips_{net}": load_lpips(net) for net in ("vgg", "alex")}  # or says what lacks
    if not (out / "crops/held_out.npz").exists():  # which is written last
        write_crops(out / "crops")
    train_once(config_of(out, args.first_steps), out / "first")
    images = load_npz(out / "crops/held_out.npz")["arr_0"]
    lines = ["| loss | PSNR (dB) | LPIPS, VGG16 | LPIPS, AlexNet |", "|---" * 4 + "|"]
    columns = [images]
    for name, losses in LOSSES.items():
        workdir = out / name.replace(" ", "")
        train_once(config_of(out, args.steps, losses), workdir)
        with using(None):
            tokenizer = load_tokenizer(workdir / "checkpoint")
            tokens = in_batches(encode_images, tokenizer, images, 4)
            columns.append(in_batches(decode_tokens, tokenizer, tokens, 4))
            found = similarities(perceptual, 4)(images, columns[-1])
        cells = [f"{psnr(images, columns[-1]).mean():.2f}"]
        cells += [f"{found[key].mean():.3f}" for key in perceptual]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    with replacing(out / "table.md") as beside:
        beside.write_text("\n".join(lines) + "\n")
    rows = np.stack(columns, axis=1)[::HELD_OUT]  # the first crop of each photograph
    save_png(out / "photographs.png", grid(rows.reshape(-1, SIZE, SIZE, 3), columns=len(columns)))
    print("\n".join(lines))


def train_once(config: Config, workdir: epath.Path) -> None:
    """Trains unless that is done. Raises: BadInput if it was done with other settings."""
    about = settings(config)  # but where the folder is, and what changes no number
    about["data"].pop("source")
    for name in ("pretrained_tokenizer", "every", "mesh"):
        del about[name]
    kept(workdir.parent / f"{workdir.name}.json", about, lambda: train(config, workdir))


def config_of(out: epath.Path, steps: int, losses: dict | None = None) -> Config:
    """The first training, or with `losses` one of those of the decoder that follow."""
    config = defaults()
    config.data.update(source=str(out / "crops"), size=SIZE, resize=1.0, flip=True)
    config.tokenizer.update(
        vocab_size=1024, latent_dim=64, channels=64, channel_mults=(1, 2, 2), num_res_blocks=1,
        patch_size=4,
    )  # fmt: skip
    config.train_tokenizer.update(
        steps=steps, batch_size=4, learning_rate=6.4e-2 if losses is None else 1.3e-2,
        schedule="cos", warmup_steps=min(30, steps // 5), final_lr_ratio=0.0, weight_decay=0.0,
        final_weight_decay=0.0, clip_norm=1.0, ema_decay=0.99,
    )  # fmt: skip
    config.every.update(log=10, save=50)
    if losses is not None:
        config.pretrained_tokenizer = str(out / "first/checkpoint")
        config.train_tokenizer.update(losses, decoder_only=True)
        config.train_tokenizer.gan.update(start=steps // 10, ramp=steps // 10)
    return from_dict(Config, config)


def write_crops(folder: epath.Path) -> None:
    """Crops as PNG, in the folders of a data source, and those held out as one npz as well."""
    rng, held_out = np.random.default_rng(0), []
    for name in NAMES:
        image = photograph(name)
        border = max(image.shape[1] - SIZE, 0)
        left, right = (image[:, :border], image[:, border:]) if border >= SIZE else ((), image)
        for number, crop in enumerate(random_crops(left, CROPS, rng)):
            save_png(folder / f"train/photograph/{name}-{number}.png", crop)
        held_out += random_crops(right, HELD_OUT, rng)
    for number, crop in enumerate(held_out):
        save_png(folder / f"validation/photograph/{number}.png", crop)
    save_npz(folder / "held_out.npz", arr_0=np.stack(held_out))


def random_crops(
    image: UInt8[np.ndarray, "H W 3"] | tuple, count: int, rng: np.random.Generator
) -> list[UInt8[np.ndarray, "S S 3"]]:
    """Squares of SIZE pixels anywhere in an image."""
    if not len(image):
        return []
    corners = [rng.integers(0, [side - SIZE + 1 for side in image.shape[:2]]) for _ in range(count)]
    return [image[y : y + SIZE, x : x + SIZE] for y, x in corners]


def photograph(name: str) -> UInt8[np.ndarray, "H W 3"]:
    """A photograph of scikit-image. Raises: BadInput if that is not installed."""
    try:
        from skimage import data
    except ImportError as error:
        raise BadInput("the photographs are scikit-image's: pip install scikit-image.") from error
    return np.asarray(getattr(data, name)())[..., :3]


if __name__ == "__main__":
    cli.run(main, define_flags)
