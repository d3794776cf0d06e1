"""The image tokenizer of the paper, f16 with 4096 codes of 32 dims (VAR §3.1, appendix).

    python -m var_jax.train --config tokenizer:256 --workdir gs://BUCKET/tokenizer

The release's tokenizer, trained with adversarial and perceptual losses on OpenImages, reaches an
rFID of about 0.9; what trains here so far is the squared error, as shown, and the quantizer's loss.
The values of the optimizer are ours, not the paper's, and have not been tried at this size.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512


def get_config(variant: str = "256") -> ConfigDict:
    """The config, for images of 256 or 512 pixels."""
    schedules = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512}
    if variant not in schedules:
        raise BadInput(f"configs/tokenizer.py has the variants 256, 512, not {variant!r}.")
    sizes = dict(patch_nums=schedules[variant])
    config = defaults()
    config.seed = 0
    config.data.update(source="imagenet", size=int(variant))
    config.tokenizer.update(sizes)
    config.train_tokenizer.update(
        steps=100_000, batch_size=768 if variant == "256" else 192, learning_rate=4e-5,
        schedule="cos", warmup_steps=2000, final_lr_ratio=0.01, b1=0.5, b2=0.9,
        weight_decay=0.0, final_weight_decay=0.0, clip_norm=10.0, ema_decay=0.9999,
    )  # fmt: skip
    config.train_transformer.update(steps=0)
    config.every.update(log=100, save=2500, evaluate=2500, sample=2500)
    return config
