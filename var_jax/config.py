"""Frozen configs of the two models. Every default is the paper's (256 px, d16).

Experiments live in `configs/*.py` as ml_collections.ConfigDict; `from_dict` turns a section of one
into these dataclasses and says in one sentence what does not fit.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from var_jax import BadInput
from var_jax.scales import PATCH_NUMS_256, PATCH_NUMS_512, num_tokens

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The multi-scale VQ-VAE (VAR §3.1): a CNN around a residual quantizer."""

    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    vocab_size: int = 4096
    latent_dim: int = 32
    channels: int = 160
    channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    patch_size: int = (
        1  # pixels folded into channels before the CNN; >1 makes small nets fast on CPU
    )
    num_phi: int = 4  # 0: one for each scale
    phi_ratio: float = 0.5
    codebook_znorm: bool = False  # nearest code by cosine instead of Euclidean distance
    beta: float = 0.25  # weight of the commitment term

    def __post_init__(self):
        check_schedule(self.patch_nums)
        for mult in self.channel_mults:
            if self.channels * mult % self.norm_groups:
                raise BadInput(
                    f"tokenizer.norm_groups={self.norm_groups} does not divide the"
                    f" {self.channels * mult} channels of a level"
                    f" (channels={self.channels}, channel_mults={self.channel_mults})."
                )

    @property
    def downsample(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_mults) - 1)

    @property
    def image_size(self) -> int:
        return self.patch_nums[-1] * self.downsample


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The next-scale transformer (VAR §3.2). `from_depth` gives the paper's family d16 ... d36."""

    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    vocab_size: int = 4096
    latent_dim: int = 32
    num_classes: int = 1000
    depth: int = 16
    width: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    shared_adaln: bool = False
    drop_path: float = 0.1 * 16 / 24  # rate of the last layer; rises linearly from 0
    dtype: str = "auto"  # of activations: bfloat16 on accelerators, float32 on CPU

    def __post_init__(self):
        check_schedule(self.patch_nums)
        if self.width % self.num_heads:
            raise BadInput(
                f"transformer.num_heads={self.num_heads} does not divide width={self.width}."
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise BadInput(
                f"transformer.dtype={self.dtype!r} is not one of auto, float32, bfloat16."
            )

    @classmethod
    def from_depth(cls, depth: int, **overrides: Any) -> "TransformerConfig":
        """Width 64·depth, depth heads, drop-path 0.1·depth/24; d36 is the 512 px model."""
        large = {"patch_nums": PATCH_NUMS_512, "shared_adaln": True} if depth == 36 else {}
        sizes = {"width": 64 * depth, "num_heads": depth, "drop_path": 0.1 * depth / 24}
        return cls(depth=depth, **{**sizes, **large, **overrides})

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_tokens(self) -> int:
        return num_tokens(self.patch_nums)


def check_schedule(patch_nums: tuple[int, ...]) -> None:
    """Raises BadInput unless the sides start at 1 and rise."""
    rising = all(a < b for a, b in itertools.pairwise(patch_nums))
    if not patch_nums or patch_nums[0] != 1 or not rising:
        raise BadInput(f"patch_nums={patch_nums} must start at 1 and rise, like (1, 2, 4, 8).")


def from_dict(cls: type[T], section: Mapping[str, Any], name: str) -> T:
    """Builds a frozen config from one section of an experiment's config.

    Raises: BadInput naming the field for an unknown field or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in section.items():
        if key not in fields:
            raise BadInput(f"{name} has no field {key!r}; its fields are {', '.join(fields)}.")
        values[key] = _checked(f"{name}.{key}", value, fields[key].default)
    return cls(**values)


def _checked(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`, the one coercion being int → float and list → tuple."""
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return tuple(value)
        raise BadInput(f"{name}={value!r} must be a tuple of integers, like {default}.")
    if type(default) is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not type(default):
        raise BadInput(
            f"{name}={value!r} is of type {type(value).__name__}, expected"
            f" {type(default).__name__}, like {default!r}."
        )
    return value
