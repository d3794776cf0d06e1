"""A ladder of sizes for scaling laws: one dial, the depth; width 32·depth, Fashion-MNIST.

    python benchmarks/ladder.py --out runs/ladder
    python -m var_jax.scaling --runs runs/ladder --out runs/ladder/laws

The first trains the tokenizer that all sizes share, encodes the images once, and trains each size;
a stopped ladder continues. A variant is a depth (`ladder:4`) or `ladder:tokenizer`. All sizes see
equally many images, in an order that depends on the seed alone. Learning rates are transferred:
they fall as 1/width. The cost of a size on two CPU cores in batches of 32 (d2, d4 and d8 measured
as CPU time, the others by their operations in between):

    depth                          2      3      4      5      6      8
    weights of the blocks     149 K  502 K 1.19 M 2.32 M 4.00 M 9.47 M
    MFLOP an image                26     73    161    304    515   1194
    ms a step                     11     30     67    122    194    411
    minutes of 1,200 steps       0.2    0.6    1.3    2.4    3.9    8.2

These are 19 minutes with second seeds of the first three. Five validations each add a quarter;
tokenizer, tokens and compilation some 8 minutes more.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults
from var_jax.schedule import PATCH_NUMS_256

STEPS = 1200  # of 32 images: 0.64 epochs


def get_config(variant: str = "4") -> ConfigDict:
    """The config of a depth, at full size for `full_DEPTH`, or of the tokenizer."""
    full, name = variant.startswith("full_"), variant.removeprefix("full_")
    if variant != "tokenizer" and not (name.isascii() and name.isdecimal() and 0 < int(name) < 100):
        raise BadInput(
            f"configs/ladder.py has variants like 4, full_16 and tokenizer, not {variant!r}."
        )
    if variant == "tokenizer":
        return small(0)
    return full_size(int(name)) if full else small(int(name))


def small(depth: int) -> ConfigDict:
    """A rung on Fashion-MNIST; depth 0 is the tokenizer alone."""
    config = defaults()
    config.seed = 0
    source = "idx:/usr/share/datasets/fashion-mnist"
    config.data.update(source=source, size=32, resize=1.0, flip=False, shift=0)
    config.tokenizer.update(
        patch_nums=(1, 2, 3, 4), vocab_size=512, latent_dim=64, channels=32, channel_mults=(1,),
        num_res_blocks=0, norm_groups=8, patch_size=8,
    )  # fmt: skip
    config.sampling.update(cfg=1.0, top_k=(0,), top_p=(0.95,))
    config.export_dtype = "bfloat16"
    if not depth:
        config.train_tokenizer.update(
            steps=1000, batch_size=32, learning_rate=8e-3, schedule="cos", warmup_steps=30,
            final_lr_ratio=0.0, weight_decay=0.0, final_weight_decay=0.0, clip_norm=1.0,
            ema_decay=0.995,
        )  # fmt: skip
        return config
    config.pretrained_tokenizer = "runs/ladder/tokenizer/checkpoint"
    config.data.tokens = "runs/ladder/tokens-0"
    width = 32 * depth
    config.transformer.update(
        num_classes=0, depth=depth, width=width, num_heads=depth, drop_path=0.0
    )
    config.train_transformer.update(
        steps=STEPS, batch_size=32, learning_rate=6.4e-2 * 128 / width, schedule="lin0",
        warmup_steps=50, final_lr_ratio=0.01, ema_decay=0.99,
    )  # fmt: skip
    config.every.update(log=10, save=STEPS // 5, evaluate=STEPS // 5)
    return config


def full_size(depth: int) -> ConfigDict:
    """A rung on ImageNet at 256 px, of the paper's family; the same 50 epochs for all."""
    steps = 50 * 1_281_167 // 768
    config = defaults()
    config.seed = 0
    config.data.update(source="imagenet", size=256)
    config.tokenizer.update(patch_nums=PATCH_NUMS_256)
    config.transformer.update(
        depth=depth, width=64 * depth, num_heads=depth, drop_path=0.1 * depth / 24,
        gamma_std=1e-3 if depth < 24 else 1e-5, remat="selective",
    )  # fmt: skip
    config.train_transformer.update(
        steps=steps, batch_size=768, learning_rate=1e-4, schedule="lin0", warmup_steps=steps // 50
    )
    config.every.update(log=100, save=2500, evaluate=5000)
    config.mesh.fsdp = 16
    return config
