"""The ablation of VAR (table 3 of the paper), in miniature: each row adds to the one before.

    python benchmarks/versus.py --study ablation --out runs/ablation

trains all rows with equal compute. They are as `versus`, beginning with a GPT-2 in raster order:
no AdaLN, no QK-norm. `top_k` and `cfg` change only how samples are drawn. The learning rate is the
same for all of a width, and falls as 1/width for `larger`. In the paper, FID of 256 px falls from
18.65 over 5.22 (var), 4.95, 4.64, 3.60 and 3.30 to 1.73.
"""

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.tools.configs import load_config

ROWS = ("raster", "var", "adaln", "top_k", "cfg", "qk_norm", "larger")


def get_config(variant: str = "qk_norm") -> ConfigDict:
    """The config of a row."""
    if variant not in ROWS:
        known = ", ".join(ROWS)
        raise BadInput(f"configs/ablation.py has the variants {known}, not {variant!r}.")
    has = lambda row: ROWS.index(variant) >= ROWS.index(row)
    config = load_config("versus:var" if has("var") else "versus:raster")
    config.transformer.update(adaln=has("adaln"), qk_norm=has("qk_norm"))
    config.sampling.update(top_p=(0.0,), top_k=(112 * has("top_k"),), cfg=1.0 * has("cfg"))
    if has("larger"):
        larger = load_config("ladder:4")
        sizes = ("depth", "width", "num_heads")
        config.transformer.update({name: larger.transformer[name] for name in sizes})
        config.train_transformer.learning_rate = 0.5 * larger.train_transformer.learning_rate
    return config
