"""The paper's class-conditional models on ImageNet (VAR §4, and the release's training commands).

    python -m var_jax.train --config imagenet:d16 --workdir gs://BUCKET/d16 \
        --config.pretrained_tokenizer=gs://BUCKET/tokenizer/checkpoint
    python -m var_jax.aot --config imagenet:d30 --topology v5e:8x16

The tokenizer is the released one (var_jax.convert) or what `--config tokenizer` leaves.
d16, d20, d24 and d30 are 256 px models, d36 is the 512 px one. d16:landscape is of 224 x 336 px
with 700 tokens (256 px: 680), d16:portrait of 336 x 224; its tokenizer is to be fine-tuned on that
schedule (configs/finetune_tokenizer.py). FID of the released weights at
50,000 samples: d16 3.36-3.55, d20 2.67-2.95, d24 2.33-2.39, d30 1.95-2.02. Training loss of d16
over all scales / the last scale at epoch 1, 10, 50, 100, 200: 8.03/8.02, 6.54/5.96, 6.25/5.58,
6.16/5.48, 6.046/5.345.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512, shape_of, size_of

IMAGES = 1_281_167
# depth: batch size, epochs, learning rate for 256 images, gates at the start, final learning rate
# and final weight decay.
RECIPES = {
    16: (768, 200, 1e-4, 1e-3, 0.1, 0.05),
    20: (768, 250, 1e-4, 1e-3, 0.1, 0.05),
    24: (768, 350, 8e-5, 1e-4, 0.01, 0.05),
    30: (1024, 350, 8e-5, 1e-5, 0.01, 0.08),
    36: (768, 350, 8e-5, 5e-6, 0.01, 0.08),
}
# 2 : 3, and scales as near to it as whole tokens are.
LANDSCAPE = (1, (1, 2), (2, 3), (3, 4), (4, 6), (5, 7), (6, 9), (8, 12), (11, 16), (14, 21))
SHAPES = {
    "": PATCH_NUMS_256,
    "landscape": LANDSCAPE,
    "portrait": tuple(size_of(shape_of(size)[::-1]) for size in LANDSCAPE),
}


def get_config(variant: str = "d16") -> ConfigDict:
    """The config; `--config.train_transformer.batch_size=512` and the like override it."""
    name, _, shape = variant.partition(":")
    names = [f"d{depth}" for depth in RECIPES]
    if name not in names or shape not in SHAPES or (shape and name == "d36"):
        known = f"{', '.join(names)}; all but d36 also with :landscape or :portrait"
        raise BadInput(f"configs/imagenet.py has the variants {known}, not {variant!r}.")
    depth = int(name[1:])
    batch_size, epochs, rate, gates, final_rate, final_decay = RECIPES[depth]
    steps = epochs * IMAGES // batch_size
    large = depth == 36
    patch_nums = PATCH_NUMS_512 if large else SHAPES[shape]
    config = defaults()
    config.seed = 0
    height, width = (16 * side for side in shape_of(patch_nums[-1]))
    config.data.update(source="imagenet", size=size_of((height, width)))
    config.tokenizer.update(patch_nums=patch_nums)
    config.transformer.update(
        depth=depth, width=64 * depth, num_heads=depth,
        drop_path=0.1 * depth / 24, shared_adaln=large, gamma_std=gates, remat="selective",
    )  # fmt: skip
    config.train_transformer.update(
        steps=steps, batch_size=batch_size, learning_rate=rate, schedule="lin0",
        warmup_steps=steps // 50, final_lr_ratio=final_rate, weight_decay=0.05,
        final_weight_decay=final_decay,
    )  # fmt: skip
    config.every.update(log=100, save=2500, evaluate=2500, sample=2500)
    # Few enough shards of the width that the rows of each, 64 to 120, fill tiles of a TPU's memory.
    config.mesh.fsdp = 32 if large else 16
    return config
