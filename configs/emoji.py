"""Emoji from nothing on two CPU cores: 1,906 Noto emoji, nine Unicode groups as classes.

    python -m var_jax.train --config configs/emoji.py        # 32x32, 9 minutes
    python -m var_jax.train --config configs/emoji.py:large  # 32x32, hours; minutes on a GPU
    python -m var_jax.train --config configs/emoji.py:64     # 64x64, likewise

The checkpoint that ships in the package is what `large` leaves (seed 0). The README has expected
figures.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults

# Few places, many passes: what one pass leaves open the next settles, seeing all of it, so that few
# tokens are drawn at once without seeing each other. Patches of 8x8 pixels, 4x4 of them or 8x8.
# Variant: pixels a side, scales, numbers a code, steps of the tokenizer and of the transformer.
VARIANTS = {
    "": (32, (1, 1, 2, 2, 4, 4, 4, 4, 4), 96, 1000, 900),
    "64": (64, (1, 1, 2, 2, 4, 4, 8, 8, 8), 96, 2000, 3000),
    "large": (32, (1, 1, 1, 2, 2, 4, 4, 4, 4, 4, 4, 4), 128, 6000, 3500),
}


def get_config(variant: str = "") -> ConfigDict:
    """The config; `--config.train_tokenizer.steps=100` and the like override it."""
    if variant not in VARIANTS:
        raise BadInput(f"configs/emoji.py has the variants 64 and large, not {variant!r}.")
    size, patch_nums, latent_dim, tokenizer_steps, transformer_steps = VARIANTS[variant]
    large = variant == "large"
    sizes = dict(patch_nums=patch_nums, vocab_size=1024, latent_dim=latent_dim)
    config = defaults()
    config.seed = 0
    # Mirrored, but never moved: a picture moved against the grid of patches has other codes.
    config.data.update(source="emoji", size=size, flip=True, shift=0)
    config.tokenizer.update(
        sizes, channels=32, channel_mults=(1,), num_res_blocks=0, norm_groups=8,
        patch_size=8, skip=True,
    )  # fmt: skip
    config.transformer.update(
        sizes, num_classes=9, depth=6 if large else 4, width=256 if large else 192,
        num_heads=4 if large else 3, shared_adaln=large, drop_path=0.1 if large else 0.0,
    )  # fmt: skip
    config.train_tokenizer.update(
        steps=tokenizer_steps, batch_size=32, learning_rate=8e-3, schedule="cos", warmup_steps=30,
        final_lr_ratio=0.0, weight_decay=0.0, final_weight_decay=0.0, clip_norm=1.0,
        ema_decay=0.995, log_every=10, save_every=250, sample_every=500,
    )  # fmt: skip
    config.train_transformer.update(
        steps=transformer_steps, batch_size=32, learning_rate=1.6e-2, schedule="lin0",
        warmup_steps=50, final_lr_ratio=0.01, ema_decay=0.999 if large else 0.99,
        augmented_copies=9 if large else 3,  # 45 or 38 % mirrored
        log_every=10, save_every=200, sample_every=500 if large else 300,
    )  # fmt: skip
    # The first scales choose the picture, the others draw it: wide for variety, then sharp.
    top_p = (0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4) if large else (0.5,)
    config.sampling.update(cfg=0.0, top_k=0, top_p=top_p)
    config.export_dtype = "bfloat16"
    return config
