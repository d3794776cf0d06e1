"""The image tokenizer of the paper, f16 with 4096 codes of 32 dims (VAR §3.2 and §4).

    python -m var_jax.train --config tokenizer:256 --workdir gs://BUCKET/tokenizer \\
        --config.train_tokenizer.gan.dino_file=dino_deitsmall16_pretrain.pth
    python -m var_jax.train --config tokenizer:256_patchgan --workdir gs://BUCKET/tokenizer

The second needs no file: LPIPS comes with `pip install 'var_jax[lpips]'`, the discriminator is a
PatchGAN. The first aims at an rFID of 1.0 after 100 epochs of ImageNet (the release, trained on
OpenImages: about 0.9); neither has been run at this size yet. The paper leaves its recipe out;
values follow

- vaex, by VAR's author: batch 768, AdamW 3e-4 (0.5, 0.9) for both networks, weight decay 0.005 and
  5e-4, clip 10, cosine to 0.3, EMA 0.9999; L2 1, L1 0.2, LPIPS 1; DINO ViT-S/16 with DiffAug,
  hinge, weight 0.4 with the adaptive factor, from 22 % of the steps on, ramp of 2 %
- XQ-GAN (ImageFolder): LeCAM 0.001
- benchmarks/collapse.md: codes restart by scale. Scale dropout (XQ-GAN has 0.1) and perturbation
  (RobustTok 0.1) did not help there, and are off
- LlamaGen and Taming Transformers: PatchGAN of three layers

512 is the same recipe at a batch of 192: 25 epochs.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.config import defaults
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512

STEPS = 167_000  # 100 epochs of ImageNet at a batch of 768
VARIANTS = ("256", "256_patchgan", "512", "512_patchgan")


def get_config(variant: str = "256") -> ConfigDict:
    """The config, for images of 256 or 512 pixels."""
    if variant not in VARIANTS:
        raise BadInput(
            f"configs/tokenizer.py has the variants {', '.join(VARIANTS)}, not {variant!r}."
        )
    size, _, discriminator = variant.partition("_")
    config = defaults()
    config.seed = 0
    config.data.update(source="imagenet", size=int(size), flip=True)
    config.tokenizer.patch_nums = PATCH_NUMS_256 if size == "256" else PATCH_NUMS_512
    config.train_tokenizer.update(
        steps=STEPS, batch_size=768 if size == "256" else 192, learning_rate=1e-4,
        schedule="cos", warmup_steps=2000, final_lr_ratio=0.3, b1=0.5, b2=0.9,
        weight_decay=0.005, final_weight_decay=0.005, clip_norm=10.0, ema_decay=0.9999,
        l1_weight=0.2, lpips_weight=1.0, restart_by_scale=True,
    )  # fmt: skip
    config.train_tokenizer.gan.update(
        weight=0.4, discriminator=discriminator or "dino", start=round(0.22 * STEPS),
        ramp=round(0.02 * STEPS), learning_rate=1e-4, weight_decay=5e-4, lecam=0.001,
        augment=True,
    )  # fmt: skip
    config.train_transformer.update(steps=0)
    config.every.update(log=100, save=2500, evaluate=2500, sample=2500)
    return config
