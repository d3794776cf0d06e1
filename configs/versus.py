"""VAR, raster-scan AR and a DiT, alike in all but what they predict: Fashion-MNIST, 8x8 latents.

    python benchmarks/versus.py --out runs/versus
    python benchmarks/versus.py --study coarse --out runs/coarse  # 4x4 latents

trains each with equal compute at three budgets, and measures all. A variant is `var`, `raster` or
`dit`, with `_4x4` for latents that coarse; each can be trained alone with --config versus:var.
Width and depth are the same, and so are codes and networks of the tokenizers, which differ as in
the paper: VAR has four scales (85 tokens; of 4x4 latents nine, 90 tokens), raster one (64; 16); the
DiT has the continuous latents of VAR's tokenizer. An image of 8x8 latents costs them 218, 155 and
146 MFLOPs of training. Learning rates are the centres of the search: half that of the ladder, and
an eighth of it for the DiT.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.tools.configs import load_config

KINDS = ("var", "raster", "dit")
VARIANTS = (*KINDS, *(f"{kind}_4x4" for kind in KINDS))


def get_config(variant: str = "var") -> ConfigDict:
    """The config of a model; the benchmark sets steps and learning rates."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise BadInput(f"configs/versus.py has the variants {known}, not {variant!r}.")
    config = load_config("ladder:3")
    config.train_tokenizer = load_config("ladder:tokenizer").train_tokenizer
    config.pretrained_tokenizer = config.data.tokens = ""
    kind, _, coarse = variant.partition("_")
    config.tokenizer.update(patch_nums=(1, 2, 4, 8), patch_size=4, latent_dim=48)
    if coarse:
        nine = load_config("fashion").tokenizer.patch_nums
        config.tokenizer.update(patch_nums=nine, patch_size=8, latent_dim=96)
    config.train_transformer.learning_rate *= 0.125 if kind == "dit" else 0.5
    config.sampling.cfg = 1.0
    config.every.update(save=500, evaluate=0)
    if kind == "raster":
        config.tokenizer.update(
            patch_nums=config.tokenizer.patch_nums[-1:], num_phi=1, phi_ratio=0.0
        )
        config.transformer.kind = "raster"
    elif kind == "dit":
        config.transformer.update(kind="dit", gamma_std=0.0)
        config.sampling.update(steps=10, solver="heun")
    return config
