"""The baselines of VAR: a raster-scan transformer (VQGAN) and a diffusion transformer (DiT).

    python -m var_jax.train --config baselines:raster   # Fashion-MNIST
    python -m var_jax.train --config baselines:dit
    python -m var_jax.aot --config baselines:dit:xl2 --topology v5e:8x16

`raster` and `dit` see the same images in the same order as `fashion`, with a transformer of the
same depth and width. The raster-scan model has the tokens of one scale, 8x8 of 4x4 pixels; the DiT
has the latents of `fashion`'s own tokenizer.

raster:227m, raster:1.4b (VQGAN; VAR, table 1) and dit:xl2 (DiT, table 4) have the sizes of the
papers at 256 px, for `aot`: 1.4 B and 675 M without the tokenizer. 227 M are taken to be with it:
the transformer has 173 M, with our tokenizer 246 M. Published FID at 256 px: 18.65, 15.78 and 2.27.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.tools.configs import load_config

IMAGES = 1_281_167


def raster(config: ConfigDict, side: int) -> None:
    """Plain vector quantization and next-token prediction."""
    config.tokenizer.update(patch_nums=(side,), num_phi=1, phi_ratio=0.0)
    config.transformer.kind = "raster"


def fashion_raster() -> ConfigDict:
    """A token for 4x4 pixels: at 8x8 one scale would keep a tenth of the codes of `fashion`."""
    config = load_config("fashion")
    raster(config, 8)
    config.tokenizer.update(patch_size=4, latent_dim=48)
    config.train_transformer.token_noise = 0.0
    config.sampling.update(cfg=1.0, top_k=(0,), top_p=(0.95,))
    return config


def fashion_dit() -> ConfigDict:
    """16 tokens, the 8x8 patches of pixels that VAR's tokenizer has."""
    config = load_config("fashion")
    config.transformer.update(kind="dit", gamma_std=0.0)
    config.train_transformer.update(token_noise=0.0, learning_rate=4e-3)
    config.sampling.update(cfg=1.0, steps=25, solver="heun")
    return config


def vqgan(depth: int, width: int, heads: int, codes: int, latent_dim: int) -> ConfigDict:
    """A GPT-2 on 16x16 tokens, the class its start token; the optimizer is that of VAR."""
    config = load_config("imagenet:d16")
    raster(config, 16)
    config.tokenizer.update(channels=128, vocab_size=codes, latent_dim=latent_dim)
    config.transformer.update(
        depth=depth, width=width, num_heads=heads, adaln=False, qk_norm=False, drop_path=0.0,
    )  # fmt: skip
    config.train_transformer.update(batch_size=256, steps=100 * IMAGES // 256)
    return config


def dit_xl2() -> ConfigDict:
    """DiT-XL/2 on latents of 32x32x4, with the optimizer of the paper (§4)."""
    config = load_config("imagenet:d16")
    config.tokenizer.update(
        patch_nums=(32,), channels=128, channel_mults=(1, 2, 4, 4), latent_dim=4, num_phi=1,
        phi_ratio=0.0,
    )  # fmt: skip
    config.transformer.update(
        kind="dit", patch_size=2, depth=28, width=1152, num_heads=16, qk_norm=False,
        drop_path=0.0, gamma_std=0.0,
    )  # fmt: skip
    config.train_transformer.update(
        batch_size=256, steps=7_000_000, learning_rate=1e-4, warmup_steps=0, final_lr_ratio=1.0,
        b2=0.999, weight_decay=0.0, final_weight_decay=0.0, ema_decay=0.9999,
    )  # fmt: skip
    return config


VARIANTS: dict[str, Callable[[], ConfigDict]] = {
    "raster": fashion_raster,
    "dit": fashion_dit,
    "raster:227m": lambda: vqgan(24, 768, 8, codes=1024, latent_dim=256),
    "raster:1.4b": lambda: vqgan(48, 1536, 24, codes=16_384, latent_dim=256),
    "dit:xl2": dit_xl2,
}


def get_config(variant: str = "raster") -> ConfigDict:
    """The config; `--config.train_transformer.steps=100` and the like override it."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise BadInput(f"configs/baselines.py has the variants {known}, not {variant!r}.")
    return VARIANTS[variant]()
