"""The library: `var_jax.load` gives a model that samples, encodes, decodes, edits and scores.

import var_jax
model = var_jax.load("emoji")
model.sample(["Flags", "Animals & Nature"], seed=0)
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, Shaped, UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.config import PER_SCALE, SamplingConfig, TokenizerConfig, from_dict, parse_guidance
from var_jax.data.classes import Label, class_index
from var_jax.data.decoding import Unreadable, crop, upright
from var_jax.evaluation.likelihood import log_likelihood
from var_jax.models.other_schedule import sampling_at, tokenizer_at, transformer_at
from var_jax.models.tokenizer import decode_tokens, encode_images
from var_jax.sampling.arguments import (
    as_array,
    as_image,
    check_batch_size,
    check_seed,
    is_whole,
    read_image,
    to_numbers,
)
from var_jax.sampling.autoregressive import KnownTokens, Weights, sample_by_scale
from var_jax.sampling.exports import Models, abstract_models, load_models, load_refiner
from var_jax.sampling.generate import (
    Generated,
    coarse_to_fine,
    generate_all,
    image_keys,
    sampler_of,
)
from var_jax.sampling.guidance import Guidance
from var_jax.sampling.masks import as_box, as_mask, box_mask, known_mask, pool_mask
from var_jax.schedule import Schedule, Size, name_of, num_tokens, px, shape_of
from var_jax.sharding.mesh import check_mesh, using
from var_jax.sharding.ops import round_up
from var_jax.sharding.rows import fetch, few_sizes, in_batches, put
from var_jax.tools.buckets import check_buckets
from var_jax.tools.images import Images
from var_jax.tools.paths import user_path
from var_jax.tools.settings import pinned

MOST_EDITS = 10_000  # results of one edit, which memory holds


def load(
    checkpoint: str | PurePath, *, mesh: jax.sharding.Mesh | None = None, dtype: str = "auto"
) -> "Model":
    """Loads a checkpoint: a folder that training or `convert` left, or "emoji" from the package.

    "hub:d16" (d20, d24, d30, d36; @REVISION if you like) are the official weights, downloaded from
    the Hugging Face Hub and converted at first use.

    It lies on `mesh`, or the one that is set (`jax.set_mesh`), or else on the first device. `dtype`
    is what the transformer computes in: "float32", "bfloat16", or as the checkpoint says.

    Raises: BadInput if there is no such checkpoint, or it is damaged; Failure of a download, or if
        a bucket cannot be reached.
    """
    check_buckets([str(user_path(checkpoint, "checkpoint"))])
    current = jax.sharding.get_mesh()
    mesh = mesh or (None if current.empty else current)
    if mesh is not None:
        check_mesh(mesh, abstract_models(checkpoint)[2].get("transformer"))
    with pinned():
        return Model(load_models(checkpoint, mesh, dtype), mesh)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A tokenizer and a transformer, ready to use. Images are uint8 (N, H, W, 3) of `image_size`::

        images = model.sample(["Flags"] * 4, seed=1)
        again = model.decode(model.encode(images))
        edited = model.edit(images[0], (0, 0, 0.5, 1), label="Flags")  # its upper half

    With several processes, all must call the same methods; each gets all results.
    """

    models: Models
    mesh: jax.sharding.Mesh | None = None

    @property
    def kind(self) -> str:
        """Which kind of model it is, "var", "raster" or "dit"."""
        return self.models.transformer.config.kind

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in order of their numbers."""
        return self.models.class_names

    @property
    def image_size(self) -> Size:
        """The side of the images in pixels; (height, width) if they are not square."""
        return self.models.tokenizer.config.image_size

    @property
    def patch_nums(self) -> Schedule:
        """The sides of the scales in tokens, coarse to fine; (height, width) of other scales."""
        return self.models.tokenizer.config.patch_nums

    def sample(
        self,
        labels: Label | Sequence[Label] | np.ndarray,
        *,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
        solver: str | None = None,
        smooth: bool = False,
        refiner: "Model | None" = None,
        draft_scales: int | None = None,
        batch_size: int = 64,
    ) -> Images:
        """Samples an image for each label, a class name or number.

        Image i depends on `seed` and i alone. These default to what the checkpoint says: `cfg`
        (guidance scale, 0: none); `top_k` (0: all codes), `top_p` (0: all) and `temperature` (which
        divides the logits that these leave), each one number or one a scale; `guidance`, where
        `cfg` applies ("ramp", "constant", "interval=3-8", "ssg=0.5", or a function (cond, uncond,
        k) of the logits of scale k, counted from 0, of which `uncond` is None where `cfg` is 0);
        `steps` and `solver` (euler, heun) of a
        diffusion transformer, which has no codes. `smooth` mixes codes, which is nicer to look at
        and not for metrics. With a `refiner` (see `load_refiner`) this model draws the first
        `draft_scales` scales, the refiner the others.

        Raises: BadInput for an unknown class, or settings out of range.
        """
        settings = self.settings(cfg, top_k, top_p, temperature, guidance, steps, solver)
        more = {"smooth": smooth, "refiner": refiner, "draft_scales": draft_scales}
        samples = self._generate(self._numbers(labels), settings, seed, batch_size, **more)
        return samples.images.view(Images)

    def at_schedule(self, patch_nums: Schedule) -> "Model":
        """This model with other scales, fewer or more or finer: `(1, 2, 4, 6)`, or of pairs.

        Nothing is trained: positions are interpolated, and settings of each scale are those of the
        nearest. The last scale decides the size of the images. What it costs is in
        docs/guides/shapes.md.

        Raises: BadInput if that is no schedule, or the model is not of kind var.
        """
        self.check_kind("another schedule", "var")
        given = self.models
        fields = dataclasses.asdict(given.tokenizer.config) | {"patch_nums": patch_nums}
        config = from_dict(TokenizerConfig, fields, "tokenizer")
        with self._using():
            models = given._replace(
                tokenizer=tokenizer_at(given.tokenizer, config),
                transformer=transformer_at(given.transformer, config.patch_nums),
                sampling=sampling_at(given.sampling, self.patch_nums, config.patch_nums),
            )
        return Model(models, self.mesh)

    def load_refiner(self, checkpoint: str | PurePath, *, dtype: str = "auto") -> "Model":
        """Loads a smaller transformer that samples the last scales after this one (`sample`).

        Collaborative decoding (CoDe, arXiv 2411.17787). It shares this model's tokenizer.

        Raises: BadInput if its checkpoint is of another tokenizer, other scales or classes; Failure
            if a bucket cannot be reached.
        """
        check_buckets([str(user_path(checkpoint, "refiner"))])
        if self.mesh is not None:
            check_mesh(self.mesh, abstract_models(checkpoint)[2].get("transformer"))
        with pinned():
            return Model(load_refiner(checkpoint, self.models, self.mesh, dtype), self.mesh)

    def sampler(
        self,
        settings: SamplingConfig,
        smooth: bool = False,
        refiner: "Model | None" = None,
        draft_scales: int | None = None,
    ) -> tuple[functools.partial, Weights]:
        """What `generate` takes to sample with these settings: the sampler, and its weights.

        Raises: BadInput if the refiner does not go with this model, or the settings not with it.
        """
        draw = sampler_of(self.kind, settings, smooth)
        weights = Weights(self.models.tokenizer, self.models.transformer)
        if refiner is None and draft_scales is None:
            return draw, weights
        most = len(self.patch_nums)
        if refiner is None or draft_scales is None:
            raise BadInput("refiner and draft_scales go together; one of them is missing.")
        if not is_whole(draft_scales, 1) or draft_scales >= most:
            raise BadInput(
                f"draft_scales={draft_scales!r}; expected 1 to {most - 1}, as the refiner samples"
                f" the others of {most} scales."
            )
        if refiner.models.tokenizer is not self.models.tokenizer:
            raise BadInput(
                "refiner has a tokenizer of its own; load it with load_refiner, and at the scales"
                " that both were trained at: a refiner takes no other schedule."
            )
        weights = weights._replace(refiner=refiner.models.transformer)
        return functools.partial(draw, draft_scales=int(draft_scales)), weights

    def sample_tokens(
        self,
        labels: Label | Sequence[Label] | np.ndarray,
        *,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
        batch_size: int = 64,
    ) -> Int32[np.ndarray, "N L"]:
        """The tokens of what `sample` returns. Raises: BadInput of a dit, as `sample` does."""
        self.check_kind("tokens of samples", "var", "raster")
        settings = self.settings(cfg, top_k, top_p, temperature, guidance)
        tokens = self._generate(self._numbers(labels), settings, seed, batch_size).tokens
        assert tokens is not None
        return tokens

    def encode(
        self, images: Shaped[np.ndarray, "*N H W 3"], *, batch_size: int = 64
    ) -> Int32[np.ndarray, "N L"]:
        """The tokens of images, coarse scale first.

        Raises: BadInput unless they are uint8 of the model's size (`crop` makes them so).
        """
        check_batch_size(batch_size)
        if isinstance(images, (str, PurePath, Image.Image)):
            raise BadInput("images are a file or a PIL image; expected an array, which crop makes.")
        given = as_array("images", images)
        images = given[None] if given.ndim == 3 else given
        shape = (*shape_of(self.image_size), 3)
        if given.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise BadInput(
                f"images are {given.dtype} of shape {given.shape}; expected uint8 (N, {shape[0]},"
                f" {shape[1]}, 3), as crop makes them."
            )
        with self._using():
            return in_batches(encode_images, self.models.tokenizer, images, batch_size)

    def decode(self, tokens: Shaped[np.ndarray, "..."], *, batch_size: int = 64) -> Images:
        """The images of tokens (N, L), each 0..V-1, as `encode` and `sample_tokens` give them.

        Raises: BadInput for other tokens.
        """
        check_batch_size(batch_size)
        tokens = self._check_tokens(tokens)
        with self._using():
            images = in_batches(decode_tokens, self.models.tokenizer, tokens, batch_size)
        return images.view(Images)

    def coarse_to_fine(self, tokens: Shaped[np.ndarray, "..."]) -> Images:
        """What the images of tokens look like after each of the K scales, (N, K, H, W, 3).

        Raises: BadInput for other tokens, or of a model without scales.
        """
        self.check_kind("coarse to fine", "var")
        tokens = self._check_tokens(tokens)
        with self._using():
            return coarse_to_fine(self.models.tokenizer, tokens).view(Images)

    def log_likelihood(
        self,
        images: Shaped[np.ndarray, "..."],
        labels: Label | Sequence[Label] | np.ndarray | None = None,
        *,
        batch_size: int = 64,
    ) -> Float[np.ndarray, "N K"]:
        """log p(tokens | class) in nats, of the tokens of each of the K scales (VAR eq. 6).

        A row's sum is the log-likelihood of an image. `images` are uint8 images, or tokens; there
        is a label for each, or one for all, or None: whatever the class.

        Raises: BadInput for an unknown class, another number of labels, or other images or tokens,
        or of a dit, which predicts no tokens.
        """
        self.check_kind("likelihood", "var", "raster")
        check_batch_size(batch_size)
        images = as_array("images", images)
        tokens = (
            self.encode(images, batch_size=batch_size)
            if images.ndim > 2
            else self._check_tokens(images)
        )
        none = np.array([len(self.class_names)], np.int32)
        numbers = none if labels is None else self._numbers(labels)
        if len(numbers) not in (1, len(tokens)):
            raise BadInput(f"{len(numbers)} labels for {len(tokens)} images; expected as many.")
        numbers = np.broadcast_to(numbers, len(tokens))
        parts = self.models.tokenizer.quantizer, self.models.transformer
        with self._using():
            return log_likelihood(*parts, tokens, numbers, batch_size)

    def edit(
        self,
        image: UInt8[np.ndarray, "..."],
        repaint: Bool[np.ndarray, "..."] | Sequence[float],
        *,
        label: Label | None = None,
        num: int = 1,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
        smooth: bool = False,
        batch_size: int = 8,
    ) -> Images:
        """Repaints part of an image, `num` times; no training is needed (VAR, appendix B).

        `repaint` is true (or 1, or 255) where to, or a box (y0, x0, y1, x1) in fractions of the
        image; it snaps to the cells of the finest scale. With a `label` what is painted is of that
        class, and without one there is no guidance. Outside, tokens are kept, and pixels up to how
        the tokenizer reconstructs them.

        Raises: BadInput if nothing is left to repaint, or the arguments are out of range.
        """
        return self.edit_tokens(
            image, repaint, label=label, num=num, seed=seed, smooth=smooth, batch_size=batch_size,
            settings=self.settings(cfg, top_k, top_p, temperature, guidance),
        )[0].images.view(Images)  # fmt: skip

    def edit_tokens(
        self,
        image: UInt8[np.ndarray, "..."],
        repaint: Bool[np.ndarray, "..."] | Sequence[float],
        *,
        settings: SamplingConfig,
        label: Label | None = None,
        num: int = 1,
        seed: int = 0,
        smooth: bool = False,
        batch_size: int = 8,
    ) -> tuple[Generated, Bool[np.ndarray, " L"]]:
        """`edit` with its tokens, and which tokens were kept."""
        self.check_kind("editing", "var")
        if not is_whole(num, 1) or num > MOST_EDITS:
            raise BadInput(f"num={num}; expected 1 to {MOST_EDITS}.")
        tokens, keep = self._known(image, repaint)
        known = KnownTokens(np.stack([tokens] * num), np.stack([keep] * num))  # type: ignore
        label, settings = self._condition(label, settings)
        labels = np.full(num, label, np.int32)
        return self._generate(labels, settings, seed, batch_size, smooth=smooth, known=known), keep

    def stream(
        self,
        label: Label | None = None,
        image: UInt8[np.ndarray, "..."] | None = None,
        repaint: Bool[np.ndarray, "..."] | Sequence[float] | None = None,
        *,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
    ) -> Iterator[Images]:
        """One image (H, W, 3) after each scale, yielded as soon as that is sampled.

        The last is the first of `sample(label)`, or of `edit(image, repaint, label=label)`, up to
        rounding. Other settings compile nothing anew, once there was one with guidance and one
        without.

        Raises: BadInput as these do.
        """
        self.check_kind("showing an image scale by scale", "var")
        settings = self.settings(cfg, top_k, top_p, temperature, guidance)
        check_seed(seed)
        known = (np.zeros(length := num_tokens(self.patch_nums), np.int32), np.zeros(length, bool))
        if image is not None or repaint is not None:
            known = self._known(image, () if repaint is None else repaint)
        label, settings = self._condition(label, settings)
        weights = Weights(self.models.tokenizer, self.models.transformer)
        with self._using():
            rows = round_up(1)
            spread = lambda x: put(np.repeat(np.asarray(x)[None], rows, axis=0))
            keys, labels = image_keys(seed, spread(np.int32(0))), spread(np.int32(label))
            tokens = KnownTokens(*map(spread, known))
            names = (*PER_SCALE, "guidance")
            options: dict[str, Any] = {name: getattr(settings, name) for name in names}
        stages = sample_by_scale(weights, labels, keys, tokens, cfg=settings.cfg or None, **options)
        for _ in self.patch_nums:
            with self._using():
                stage = fetch(next(stages), 1)[0].copy().view(Images)
            yield stage  # outside: settings and mesh are the caller's while it has its turn

    def crop(self, image: str | PurePath | Image.Image | UInt8[np.ndarray, "H W *C"]) -> Images:
        """An image file, array or PIL image as the model takes it: resized, the centre cropped.

        Raises: BadInput if it cannot be read.
        """
        if isinstance(image, (str, PurePath)):
            opened = read_image(image)
        else:
            opened = image if isinstance(image, Image.Image) else as_image(image)
            if 0 in opened.size:
                raise BadInput(f"image has the size {opened.size}; expected pixels.")
            try:
                opened = upright(opened)
            except (Unreadable, OSError, ValueError) as error:  # ValueError: it is closed
                raise BadInput(f"image cannot be read: {error}.") from error
        return crop(opened, self.image_size, resize=1).copy().view(Images)

    def settings(
        self,
        cfg: float | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
        solver: str | None = None,
    ) -> SamplingConfig:
        """The checkpoint's settings of sampling, where arguments do not replace them.

        Raises: BadInput if they are out of range, mean nothing for this kind of model, or are of
        another number of scales.
        """
        given: dict[str, Any] = {
            "cfg": cfg, "top_k": top_k, "top_p": top_p, "temperature": temperature,
            "guidance": guidance, "steps": steps, "solver": solver,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        known = self.models.sampling.flags(self.kind)
        if others := [name for name in given if name not in known]:
            value = given[others[0]]
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise BadInput(
                f"{others[0]}={text} means nothing here: a model of kind {self.kind} is sampled"
                f" with {', '.join(known)}."
            )
        for name in ("cfg", *PER_SCALE):
            if name in given:
                given[name] = to_numbers(name, given[name])
        if cfg is not None:
            given["cfg"], *more = given["cfg"]
            if more:
                raise BadInput(f"cfg={cfg!r}; expected one number.")
        if top_k is not None:
            if wrong := [k for k in given["top_k"] if k < 0 or not k.is_integer()]:
                raise BadInput(f"top_k={wrong[0]:g}; expected a whole number of at least 0.")
            # One program for all that are no less than the codes.
            codes = self.models.tokenizer.config.vocab_size
            given["top_k"] = tuple(int(k) if k < codes else 0 for k in given["top_k"])
        if steps is not None and not is_whole(steps, 1):
            raise BadInput(f"steps={steps!r}; expected a whole number of at least 1.")
        settings = dataclasses.replace(self.models.sampling, **given)
        settings.check(self.patch_nums)
        given_name = parse_guidance(guidance)[0] if isinstance(guidance, str) else ""
        if given_name in ("constant", "interval") and not settings.cfg:
            raise BadInput(f"guidance={guidance} is of cfg, the guidance scale, which is 0.")
        return settings

    def check_kind(self, what: str, *kinds: str) -> None:
        """Raises BadInput unless the model is of one of the kinds that can do `what`."""
        if self.kind not in kinds:
            raise BadInput(
                f"{what} takes a model of kind {' or '.join(kinds)}; this one is of kind"
                f" {self.kind}."
            )

    def class_index(self, label: Label, name: str = "label") -> int:
        """The number of a class that is given by number or by name (`classes.class_index`).

        Raises: BadInput, which calls the argument `name`, unless exactly one class is meant.
        """
        if isinstance(label, (np.ndarray, jax.Array)) and label.ndim == 0:
            label = label.item()
        return class_index(self.class_names, label, name)

    def _numbers(self, labels: Any) -> Int32[np.ndarray, " N"]:
        if isinstance(labels, (np.ndarray, jax.Array)):
            labels = np.asarray(labels).tolist()
        alone = as_array("labels", labels).ndim == 0
        several = [labels] if alone else list(labels)  # type: ignore[arg-type]
        if not several:
            raise BadInput("no labels are given; expected at least one class.")
        return np.array([self.class_index(label) for label in several], np.int32)  # type: ignore

    def _condition(
        self, label: Label | None, settings: SamplingConfig
    ) -> tuple[int, SamplingConfig]:
        """The number of a class, or "no class", whose guidance would change nothing."""
        if label is None:
            return len(self.class_names), dataclasses.replace(settings, cfg=0.0)
        return self.class_index(label), settings

    def _known(
        self, image: UInt8[np.ndarray, "..."] | None, repaint: Any
    ) -> tuple[Int32[np.ndarray, " L"], Bool[np.ndarray, " L"]]:
        """The tokens of an image, and which of them an edit keeps."""
        cells, size = self.patch_nums[-1], shape_of(self.image_size)
        if (shape := as_array("image", image).shape) != (*size, 3):
            raise BadInput(
                f"image has the shape {shape}; expected {(*size, 3)}, which crop gives any image."
            )
        area = as_array("repaint", repaint)
        if area.shape == size:
            where = pool_mask(as_mask(area), cells)
        elif area.shape == (4,):
            where = box_mask(as_box(f"box {repaint}", to_numbers("repaint", repaint)), cells)
        else:
            raise BadInput(
                f"repaint has shape {area.shape}; expected a mask of {size} or a"
                " box (y0, x0, y1, x1)."
            )
        if not where.any():
            raise BadInput(f"nothing is left to repaint on the {name_of(cells)} cells.")
        return self.encode(np.asarray(image))[0], known_mask(where, self.patch_nums)

    def _check_tokens(self, tokens: Any) -> Int32[np.ndarray, "N L"]:
        tokens, codes = as_array("tokens", tokens), self.models.tokenizer.config.vocab_size
        length = num_tokens(self.patch_nums)
        integers = np.issubdtype(tokens.dtype, np.integer)
        if not integers or tokens.ndim != 2 or tokens.shape[1] != length or not len(tokens):
            raise BadInput(
                f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers of shape"
                f" (N, {length}), as encode and sample_tokens give them."
            )
        if not 0 <= tokens.min() <= tokens.max() < codes:
            raise BadInput(
                f"tokens hold {tokens.min()} to {tokens.max()}; expected 0 to {codes - 1}."
            )
        return tokens.astype(np.int32)

    def _generate(
        self,
        labels: Int32[np.ndarray, " N"],
        settings: SamplingConfig,
        seed: int,
        batch_size: int,
        *,
        known: KnownTokens | None = None,
        **more: Any,
    ) -> Generated:
        check_seed(seed)
        check_batch_size(batch_size)
        draw, weights = self.sampler(settings, **more)
        options = {"batch_size": few_sizes(len(labels), batch_size), "seed": seed, "known": known}
        with self._using():
            return generate_all(draw, weights, labels, **options)

    def _using(self) -> contextlib.AbstractContextManager[Any]:
        if self.mesh is None and not jax.sharding.get_mesh().empty:
            raise BadInput("a mesh is set, but the model was loaded without one; load it again.")
        return using(self.mesh)

    def __repr__(self) -> str:
        c = self.models.transformer.config
        what = f"scales {self.patch_nums}" if self.kind == "var" else f"kind {self.kind}"
        return (
            f"Model({px(self.image_size)}, {len(self.class_names)} classes, depth {c.depth}, width"
            f" {c.width}, {what})"
        )
