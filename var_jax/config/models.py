"""The two models: the tokenizer and the transformer."""

import dataclasses
import math
from dataclasses import field
from typing import Any

from var_jax import BadInput
from var_jax.config.checks import (
    ANY,
    FREE,
    PART,
    SHARE,
    SOME,
    check_dtype,
    check_ranges,
    check_schedule,
)
from var_jax.schedule import (
    PATCH_NUMS_256,
    PATCH_NUMS_512,
    Pattern,
    Schedule,
    Size,
    lengths,
    num_tokens,
    shape_of,
    size_of,
)

KINDS = ("var", "raster", "dit")  # of transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The multi-scale VQ-VAE (VAR §3.2): a CNN around a residual quantizer."""

    # Sizes of the scales in tokens, coarse to fine: a side, or (height, width).
    patch_nums: Schedule = PATCH_NUMS_256
    vocab_size: int = 4096  # codes in the codebook
    latent_dim: int = 32  # width of a code vector
    channels: int = 160  # of the CNN at full resolution
    channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)  # of each level; a level halves the sides
    num_res_blocks: int = 2  # of each level
    norm_groups: int = 32  # of GroupNorm
    patch_size: int = 1  # above 1: patches of pixels, a linear map beside the CNN (patch_codec)
    num_phi: int = 4  # 0: one for each scale
    phi_ratio: float = 0.5  # share of the 3×3 convolution in phi, beside the identity
    codebook_znorm: bool = False  # nearest code by cosine instead of Euclidean distance
    beta: float = 0.25  # weight of the commitment term

    def __post_init__(self):
        object.__setattr__(self, "patch_nums", tuple(map(size_of, self.patch_nums)))
        check_schedule(self.patch_nums)
        check_ranges(
            self, vocab_size=SOME, latent_dim=SOME, channels=SOME, num_res_blocks=ANY,
            norm_groups=SOME, patch_size=SOME, num_phi=ANY, phi_ratio=SHARE, beta=ANY,
        )  # fmt: skip
        if min(self.channel_mults, default=0) < 1:
            raise BadInput(f"channel_mults={self.channel_mults}; expected numbers of at least 1.")
        if not self.num_res_blocks and len(set((1, *self.channel_mults))) > 1:
            raise BadInput(
                f"channel_mults={self.channel_mults} with num_res_blocks=0: only residual"
                " blocks change the width, so every multiplier must be 1."
            )
        for mult in self.channel_mults:
            if self.channels * mult % self.norm_groups:
                raise BadInput(
                    f"norm_groups={self.norm_groups} does not divide the"
                    f" {self.channels * mult} channels of a level"
                    f" (channels={self.channels}, channel_mults={self.channel_mults})."
                )

    @property
    def downsample(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_mults) - 1)

    @property
    def image_size(self) -> Size:
        """Side of the images in pixels, or (height, width)."""
        height, width = shape_of(self.patch_nums[-1])
        return size_of((height * self.downsample, width * self.downsample))

    @property
    def images_at_a_time(self) -> int:
        """On a device, beside the transformer: eight of 256 px keep it busy, and bound memory.

        24 in one part made XLA's TPU compiler tile the convolutions so badly that a step of d16
        took 15 times as long (benchmarks/aot.md).
        """
        return max(1, 8 * 256 * 256 // math.prod(shape_of(self.image_size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """A stack of AdaLN blocks, whatever network they are of."""

    depth: int = 16  # layers
    width: int = 1024  # of the residual stream
    num_heads: int = 16  # of attention, each width / num_heads wide
    mlp_ratio: float = 4.0  # width of the MLP, in widths
    qk_norm: bool = True  # queries and keys of unit length, with a temperature for each head
    adaln: bool = True  # False: LayerNorms with weights of their own, as in GPT-2
    shared_adaln: bool = False  # one AdaLN map for all layers instead of one each
    drop_path: float = 0.1 * 16 / 24  # rate of the last layer; rises linearly from 0
    gamma_std: float = 1e-5  # of AdaLN's gates at the start, times (3·width)^-0.5
    dtype: str = "auto"  # of activations: bfloat16 on accelerators, float32 on CPU
    # One of masked, blocks, kernel, cudnn: see models/attention.py.
    attention: str = field(default="auto", metadata=FREE)
    # What is recomputed backward: none, selective (elementwise work), full.
    remat: str = field(default="none", metadata=FREE)

    def __post_init__(self):
        check_ranges(
            self, depth=SOME, width=SOME, num_heads=SOME, mlp_ratio=ANY, drop_path=PART,
            gamma_std=ANY,
        )  # fmt: skip
        if self.shared_adaln and not self.adaln:
            raise BadInput("shared_adaln=True needs adaln=True.")
        if self.width % self.num_heads:
            raise BadInput(f"num_heads={self.num_heads} does not divide width={self.width}.")
        check_dtype(self.dtype)
        if self.attention not in ("auto", "masked", "blocks", "kernel", "cudnn"):
            raise BadInput(
                f"attention={self.attention!r} is not one of auto, masked, blocks, kernel, cudnn."
            )
        if self.attention == "kernel" and 128 % self.head_dim:
            raise BadInput(
                f"attention='kernel' needs heads whose width divides 128, not of {self.head_dim}."
            )
        if self.remat not in ("none", "selective", "full"):
            raise BadInput(f"remat={self.remat!r} is not one of none, selective, full.")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlocksConfig):
    """The generative transformer; `from_depth` gives the paper's family d16 ... d36 (VAR §4).

    `kind` says what it predicts: "var" the next scale, "raster" the next token in raster order,
    "dit" the noise in the tokenizer's continuous latent (a diffusion transformer).
    """

    kind: str = "var"  # or the baselines raster, dit
    patch_size: int = 1  # of a dit: side of the patches of the latent that are its tokens
    patch_nums: Schedule = PATCH_NUMS_256  # these three are the tokenizer's
    vocab_size: int = 4096
    latent_dim: int = 32
    window: int = 0  # scales that a token sees, its own and those before it; 0, or K: all
    num_classes: int = 1000  # of an experiment, 0: as many as its data have

    def __post_init__(self):
        object.__setattr__(self, "patch_nums", tuple(map(size_of, self.patch_nums)))
        check_schedule(self.patch_nums)
        super().__post_init__()
        check_ranges(
            self, vocab_size=SOME, latent_dim=SOME, num_classes=ANY, patch_size=SOME,
            window=ANY,
        )  # fmt: skip
        if self.kind not in KINDS:
            raise BadInput(f"kind={self.kind!r} is not one of {', '.join(KINDS)}.")

    def check(self) -> None:
        """Raises BadInput if the schedule or AdaLN are not such as this kind of model needs."""
        scales, kind = self.patch_nums, f"kind={self.kind} with patch_nums={self.patch_nums}"
        if self.kind == "var" and scales[0] != 1:
            raise BadInput(f"{kind}: VAR begins with a scale of one token; raster and dit do not.")
        if self.kind == "raster" and len(scales) > 1:
            raise BadInput(f"{kind}: a raster-scan model takes a single scale, like (16,).")
        for side in shape_of(self.patch_nums[-1]):
            if self.kind == "dit" and side % self.patch_size:
                raise BadInput(f"{kind}: patch_size={self.patch_size} does not divide {side}.")
        if self.patch_size > 1 and self.kind != "dit":
            raise BadInput(f"{kind}: patch_size={self.patch_size} is of dit; others take tokens.")
        if self.kind == "dit" and not self.adaln:
            raise BadInput("kind=dit needs adaln=True: its blocks learn the time no other way.")
        if self.window and self.kind != "var":
            raise BadInput(f"{kind}: window={self.window} counts scales, which only VAR predicts.")
        if self.window == 1 and not self.adaln:
            raise BadInput("window=1 needs adaln=True: later scales see the class no other way.")

    @classmethod
    def from_depth(cls, depth: int, **overrides: Any) -> "TransformerConfig":
        """Width 64·depth, depth heads, drop-path 0.1·depth/24; d36 is the 512 px model."""
        large = {"patch_nums": PATCH_NUMS_512, "shared_adaln": True} if depth == 36 else {}
        sizes = {"width": 64 * depth, "num_heads": depth, "drop_path": 0.1 * depth / 24}
        return cls(depth=depth, **{**sizes, **large, **overrides})

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, as the tokenizer has them."""
        return num_tokens(self.patch_nums)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Lengths of the blocks of tokens that are predicted at once, one block after another."""
        if self.kind == "raster":
            return (1,) * self.num_tokens
        if self.kind == "dit":
            return (lengths(self.patch_nums)[-1] // self.patch_size**2,)
        return lengths(self.patch_nums)

    @property
    def pattern(self) -> Pattern:
        """Which tokens see which."""
        return Pattern(self.blocks, self.window)
