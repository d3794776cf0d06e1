"""A config small enough for tests: emoji at 16×16, seconds instead of minutes."""

from ml_collections import ConfigDict

from var_jax.config import defaults


def get_config() -> ConfigDict:
    sizes = dict(patch_nums=(1, 2, 4), vocab_size=64, latent_dim=16)
    config = defaults()
    config.seed = 0
    config.data.update(source="emoji", size=16, flip=False, shift=1)
    config.tokenizer.update(
        sizes, channels=16, channel_mults=(1,), num_res_blocks=0, norm_groups=4, patch_size=4,
    )  # fmt: skip
    config.transformer.update(num_classes=9, depth=2, width=32, num_heads=2)
    stage = dict(
        steps=12, batch_size=16, learning_rate=1e-2, ema_decay=0.9,
    )  # fmt: skip
    config.train_tokenizer.update(stage)
    config.train_transformer.update(stage, token_noise=0.2)
    config.every.update(log=1, save=4, evaluate=6, sample=6)
    config.report = "var_jax.evaluation.pixel_report:report"
    return config
