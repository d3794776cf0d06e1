"""Frozen configs: the two models, their training, the data, the mesh.

Defaults are the paper's where it has them.

An experiment is a file in `configs/` that updates `defaults()`, a ConfigDict with the fields of
`Config`; `from_dict` turns it into these dataclasses and says in one sentence what does not fit.
"""

from var_jax.config.checks import FREE, MOST, MOST_VALUES, SET
from var_jax.config.experiment import (
    LEAST_SCALES,
    MAX_SEED,
    SHARED,
    Config,
    DataConfig,
    EveryConfig,
    MeshConfig,
)
from var_jax.config.models import BlocksConfig, TokenizerConfig, TransformerConfig
from var_jax.config.reading import bound_value, defaults, from_dict, settings
from var_jax.config.sampling import PER_SCALE, SamplingConfig, listed, parse_guidance
from var_jax.config.training import (
    GanConfig,
    TrainConfig,
    TrainTokenizerConfig,
    TrainTransformerConfig,
    parse_lr_scale,
)

__all__ = [
    "FREE", "LEAST_SCALES", "MAX_SEED", "MOST", "MOST_VALUES", "PER_SCALE", "SET", "SHARED",
    "BlocksConfig", "Config", "DataConfig", "EveryConfig", "GanConfig", "MeshConfig",
    "SamplingConfig", "TokenizerConfig", "TrainConfig", "TrainTokenizerConfig",
    "TrainTransformerConfig", "TransformerConfig", "bound_value", "defaults", "from_dict", "listed",
    "parse_guidance", "parse_lr_scale", "settings",
]  # fmt: skip
