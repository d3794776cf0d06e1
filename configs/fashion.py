"""Fashion-MNIST from scratch on two CPU cores: 60,000 images of clothes in ten classes.

    apt-get install dataset-fashion-mnist
    python -m var_jax.train --config fashion        # minutes
    python -m var_jax.train --config fashion:large  # a GPU, or a night (not run yet)

The 28x28 grey images have a black border up to 32x32. Elsewhere than on Debian, put the four IDX
files into a folder and say --config.data.source=idx:FOLDER.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults


class Variant(NamedTuple):
    """What differs. Patches are of 8x8 pixels."""

    patch_nums: tuple[int, ...] = (1, 1, 2, 2, 4, 4, 4, 4, 4)
    tokenizer_steps: int = 2500
    transformer_steps: int = 1400
    vocab_size: int = 1024
    latent_dim: int = 96
    depth: int = 4
    width: int = 192
    drop_path: float = 0.0
    ema_decay: float = 0.99
    token_noise: float = 0.2
    # The first scales choose the image, the others refine it: wide for variety, then narrow.
    top_p: tuple[float, ...] = (0.95, 0.95, 0.9, 0.8, 0.5, 0.3, 0.1, 0.1, 0.1)


VARIANTS = {
    "": Variant(),
    "large": Variant(
        tokenizer_steps=10_000, transformer_steps=10_000, vocab_size=2048, depth=6, width=384,
        drop_path=0.1, ema_decay=0.999,
    ),
}  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """The config; `--config.train_tokenizer.steps=100` and the like override it."""
    if variant not in VARIANTS:
        raise BadInput(f"configs/fashion.py has the variant large, not {variant!r}.")
    this = VARIANTS[variant]
    sizes = dict(patch_nums=this.patch_nums, vocab_size=this.vocab_size, latent_dim=this.latent_dim)
    config = defaults()
    config.seed = 0
    source = "idx:/usr/share/datasets/fashion-mnist"
    config.data.update(source=source, size=32, resize=1.0, flip=False, shift=0)
    config.tokenizer.update(
        sizes, channels=32, channel_mults=(1,), num_res_blocks=0, norm_groups=8, patch_size=8,
    )  # fmt: skip
    config.transformer.update(
        num_classes=0, depth=this.depth, width=this.width, num_heads=this.width // 64,
        drop_path=this.drop_path,
    )  # fmt: skip
    config.train_tokenizer.update(
        steps=this.tokenizer_steps, batch_size=32, learning_rate=8e-3, schedule="cos",
        warmup_steps=30, final_lr_ratio=0.0, weight_decay=0.0, final_weight_decay=0.0,
        clip_norm=1.0, ema_decay=0.995, restart_by_scale=True, codebook_restart=0.01,
    )  # fmt: skip
    config.train_transformer.update(
        steps=this.transformer_steps, batch_size=32, learning_rate=1.6e-2, schedule="lin0",
        warmup_steps=50, final_lr_ratio=0.01, ema_decay=this.ema_decay,
        token_noise=this.token_noise,
    )  # fmt: skip
    config.every.update(log=10, save=500, evaluate=500, sample=1000)
    config.sampling.update(cfg=1.0, top_k=(0,), top_p=this.top_p)
    config.export_dtype = "bfloat16"
    config.report = "var_jax.evaluation.pixel_report:report"
    return config
