"""Fine-tunes the transformer of a checkpoint, converted or own, on other data.

    python -m var_jax.train --config finetune:hub:d16 --workdir runs/pets --config.data.source=pets

The variant is the checkpoint. Tokenizer, sizes and image size are its own; classes are those of the
data: one of a name that the checkpoint knows keeps its embedding. The learning rate is 1e-4 for 256
images: at batch 64 its peak, after the warm-up, is 2.5e-5, a twelfth of that of d16 from scratch.
Small models want more (docs/guides/finetune.md). `--config.train_transformer.lr_scale=head=1,.*=0`
would train the head alone.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import SHARED, SamplingConfig, defaults, from_dict
from var_jax.sampling.exports import abstract_models


def get_config(variant: str = "emoji") -> ConfigDict:
    """The config that starts from the checkpoint `variant`."""
    about, models = abstract_models(variant)[1:]
    if "transformer" not in about:
        raise BadInput(f"{variant} holds a tokenizer but no transformer to start from.")
    config = defaults()
    config.seed = 0
    config.init_from = config.pretrained_tokenizer = variant
    tokenizer, transformer = vars(models["tokenizer"].config), about["transformer"]
    config.tokenizer.update(tokenizer)
    same = {name: transformer[name] for name in transformer if name not in SHARED}
    config.transformer.update(same, num_classes=0)
    config.data.size = models["tokenizer"].config.image_size
    config.train_transformer.update(
        steps=2000, batch_size=64, learning_rate=1e-4, schedule="lin0", warmup_steps=100,
        final_lr_ratio=0.1, ema_decay=0.99,
    )  # fmt: skip
    config.every.update(log=10, save=200, evaluate=200, sample=200)
    config.sampling.update(vars(from_dict(SamplingConfig, about["sampling"], "sampling")))
    return config
