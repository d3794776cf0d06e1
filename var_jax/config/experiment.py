"""One experiment: the models, their training, the data, the mesh, and what they must agree on."""

import dataclasses
from dataclasses import field

from var_jax import BadInput
from var_jax.config.checks import ANY, FREE, SET, SOME, check_ranges
from var_jax.config.models import TokenizerConfig, TransformerConfig
from var_jax.config.sampling import SamplingConfig
from var_jax.config.training import TrainTokenizerConfig, TrainTransformerConfig
from var_jax.schedule import Size, shape_of, size_of

MAX_SEED = 2**32 - 1  # jax.random.key takes more, and gives the same
LEAST_SCALES = 3  # that scale dropout keeps
# What the two models must agree on is said once, in the tokenizer's section.
SHARED = ("patch_nums", "vocab_size", "latent_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryConfig:
    """After how many steps things happen, in both trainings; after the last step all of them do."""

    log: int = 50  # a record of the metrics
    save: int = 1000  # a checkpoint; the newest three stay
    keep: int = 0  # a checkpoint that stays for good; 0: none
    evaluate: int = 0  # metrics of the validation set; 0: only at the end
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
    shift: int = 0  # shift crops randomly by at most this many pixels
    # Processes that decode, beside threads; they need room in /dev/shm.
    workers: int = field(default=0, metadata=FREE)
    # A token cache (var_jax.encode) that the transformer trains from.
    tokens: str = field(default="", metadata=SET)

    def __post_init__(self):
        object.__setattr__(self, "size", size_of(self.size))
        check_ranges(self, size=SOME, resize=SOME, shift=ANY, workers=ANY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; one of them may be -1, "what is left"."""

    data: int = -1  # copies of the weights, each with its share of the batch
    # Parts of weights, moments and batch; weights are gathered layer by layer. Must divide the
    # transformer's width. With data=-1 it is an upper limit: the value used is its greatest common
    # divisor with the number of devices (of a slice, over tensor).
    fsdp: int = 1
    tensor: int = 1  # parts of heads, MLP and vocabulary; must divide each of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: both models and how they are trained."""

    tokenizer: TokenizerConfig = field(default=TokenizerConfig())
    transformer: TransformerConfig = field(default=TransformerConfig())
    train_tokenizer: TrainTokenizerConfig = field(default=TrainTokenizerConfig())
    train_transformer: TrainTransformerConfig = field(default=TrainTransformerConfig())
    every: EveryConfig = field(default=EveryConfig(), metadata=FREE)
    data: DataConfig = DataConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata=FREE)
    sampling: SamplingConfig = field(default=SamplingConfig(), metadata=FREE)
    # A checkpoint whose tokenizer is taken; train_tokenizer.steps above 0 fine-tune it.
    pretrained_tokenizer: str = field(default="", metadata=SET)
    # A checkpoint whose transformer the training starts from (fine-tuning).
    init_from: str = field(default="", metadata=SET)
    # MODULE:FUNCTION whose results join summary.json at the end of a run.
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
        if self.data.tokens and self.train_transformer.encoder_dtype != "float32":
            raise BadInput(
                f"train_transformer.encoder_dtype={self.train_transformer.encoder_dtype} is of"
                " images that are encoded in the step; with data.tokens there are none."
            )
        training = self.train_transformer
        if training.steps and not (training.label_dropout or self.init_from) and self.sampling.cfg:
            raise BadInput(
                f"sampling.cfg={self.sampling.cfg} guides away from samples of no class, which"
                " train_transformer.label_dropout=0 never trains; set sampling.cfg=0, or"
                " label_dropout above 0."
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
        student = self.train_transformer.student_forcing
        if student and (kind != "var" or len(self.transformer.patch_nums) == 1):
            raise BadInput(
                f"train_transformer.student_forcing={student} needs a model that predicts one scale"
                f" after another; kind={kind} with patch_nums={self.transformer.patch_nums} does"
                " not."
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
