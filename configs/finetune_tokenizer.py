"""Fine-tunes the tokenizer of a checkpoint, converted or own, on other images.

    python -m var_jax.train --config finetune_tokenizer:d16 --workdir runs/sharper \\
        --config.data.source=photographs --config.train_tokenizer.decoder_only=true

The variant is the checkpoint. With decoder_only the tokens of an image stay, so the checkpoint's
transformer stays of use, and is in the new checkpoint too; without it, encoder and codes learn as
well. Another schedule and resolution, where the tokenizer is fully convolutional, is said as

    --config.tokenizer.patch_nums=1,2,3,4,6,9,13,18,24,32 --config.data.size=512

The learning rate is 0.3 times that of configs/tokenizer.py, which trains from scratch. Losses are
squared and absolute error: configs/tokenizer.py has the recipe with LPIPS and a discriminator.
"""

from ml_collections import ConfigDict

from var_jax.config import defaults
from var_jax.sampling.exports import abstract_models


def get_config(variant: str = "emoji") -> ConfigDict:
    """The config that starts from the tokenizer of the checkpoint `variant`."""
    tokenizer = abstract_models(variant)[2]["tokenizer"].config
    config = defaults()
    config.seed = 0
    config.pretrained_tokenizer = variant
    config.tokenizer.update(vars(tokenizer))
    config.data.size = tokenizer.image_size
    config.train_tokenizer.update(
        steps=2000, batch_size=64, learning_rate=3e-5, schedule="cos", warmup_steps=100,
        final_lr_ratio=0.1, b1=0.5, b2=0.9, weight_decay=0.0, final_weight_decay=0.0,
        clip_norm=1.0, ema_decay=0.99, l1_weight=0.2,
    )  # fmt: skip
    config.every.update(log=10, save=200, evaluate=200, sample=200)
    return config
