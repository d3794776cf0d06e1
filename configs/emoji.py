"""The default experience: emoji from nothing, on two CPU cores, in a quarter of an hour.

    python -m var_jax.train --config configs/emoji.py

1,906 Noto emoji at 32×32, nine Unicode groups as classes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; `--config.train_tokenizer.steps=100` and the like override it."""
    sizes = dict(patch_nums=(1, 2, 3, 4, 6, 8), vocab_size=1024, latent_dim=48)
    config = ConfigDict()
    config.seed = 0
    config.data = dict(source="emoji", size=32, flip=False, shift=2)
    config.tokenizer = dict(
        sizes, channels=32, channel_mults=(1,), num_res_blocks=0, norm_groups=8, patch_size=4,
        skip=True,
    )  # fmt: skip
    config.transformer = dict(sizes, num_classes=9, depth=6, width=192, num_heads=6, drop_path=0.0)
    config.train_tokenizer = dict(
        steps=2000, batch_size=32, learning_rate=8e-3, schedule="cos", warmup_steps=50,
        final_lr_ratio=0.0, weight_decay=0.0, final_weight_decay=0.0, clip_norm=1.0, b2=0.95,
        ema_decay=0.998, log_every=20, save_every=500, sample_every=500,
    )  # fmt: skip
    config.train_transformer = dict(
        steps=2000, batch_size=64, learning_rate=4e-3, schedule="lin0", warmup_steps=100,
        final_lr_ratio=0.01, ema_decay=0.998, augmented_copies=8, log_every=20, save_every=500,
        sample_every=500,
    )  # fmt: skip
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    return config
