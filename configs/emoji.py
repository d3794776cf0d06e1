"""Emoji from scratch on two CPU cores: 1,906 Noto emoji, of which 194 are for validation, in the
nine groups of Unicode as classes.

    python -m var_jax.train --config emoji        # 32x32, minutes
    python -m var_jax.train --config emoji:large  # 32x32, hours
    python -m var_jax.train --config emoji:64     # 64x64, minutes on a GPU

Results: benchmarks/emoji.md.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults


class Variant(NamedTuple):
    """What differs. Patches are of 8x8 pixels.

    A coarse grid predicted many times: few tokens are sampled at once without seeing each other,
    and each pass refines all of the image.
    """

    patch_nums: tuple[int, ...] = (1, 1, 2, 2, 4, 4, 4, 4, 4)
    tokenizer_steps: int = 1000
    transformer_steps: int = 850
    size: int = 32
    vocab_size: int = 1024
    latent_dim: int = 96
    depth: int = 4
    width: int = 192
    shared_adaln: bool = False
    drop_path: float = 0.0
    ema_decay: float = 0.99
    token_noise: float = 0.2
    # The first scales choose the image, the others refine it: wide for variety, then narrow.
    top_p: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)


VARIANTS = {
    "": Variant(),
    "64": Variant((1, 1, 2, 2, 4, 4, 8, 8, 8), 2000, 3000, size=64),
    # Shared AdaLN buys width: the checkpoint has to stay under 12 MB.
    "large": Variant(
        (1, 1, 1, 2, 2, 4, 4, 4, 4, 4, 4, 4), 4000, 4000, vocab_size=2048, latent_dim=128,
        depth=6, width=256, shared_adaln=True, drop_path=0.1, ema_decay=0.999,
        token_noise=0.3,
        top_p=(0.9, 0.8, 0.7, 0.5, 0.3) + 7 * (0.1,),
    ),
}  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
    """The config; `--config.train_tokenizer.steps=100` and the like override it."""
    if variant not in VARIANTS:
        raise BadInput(f"configs/emoji.py has the variants 64 and large, not {variant!r}.")
    this = VARIANTS[variant]
    sizes = dict(patch_nums=this.patch_nums, vocab_size=this.vocab_size, latent_dim=this.latent_dim)
    config = defaults()
    config.seed = 0
    # Mirrored, but never moved: an image moved against the grid of patches has other codes.
    config.data.update(source="emoji", size=this.size, flip=True, shift=0)
    config.tokenizer.update(
        sizes, channels=32, channel_mults=(1,), num_res_blocks=0, norm_groups=8, patch_size=8,
    )  # fmt: skip
    config.transformer.update(
        num_classes=0, depth=this.depth, width=this.width, num_heads=this.width // 64,
        shared_adaln=this.shared_adaln, drop_path=this.drop_path,
    )  # fmt: skip
    config.train_tokenizer.update(
        steps=this.tokenizer_steps, batch_size=32, learning_rate=8e-3, schedule="cos",
        warmup_steps=30, final_lr_ratio=0.0, weight_decay=0.0, final_weight_decay=0.0,
        clip_norm=1.0, ema_decay=0.995,
    )  # fmt: skip
    config.train_transformer.update(
        steps=this.transformer_steps, batch_size=32, learning_rate=1.6e-2, schedule="lin0",
        warmup_steps=50, final_lr_ratio=0.01, ema_decay=this.ema_decay,
        token_noise=this.token_noise,
    )  # fmt: skip
    config.every.update(log=10, save=250, evaluate=250, sample=500)
    config.sampling.update(cfg=0.0, top_k=(0,), top_p=this.top_p)
    config.export_dtype = "bfloat16"
    config.report = "var_jax.evaluation.pixel_report:report"
    return config
