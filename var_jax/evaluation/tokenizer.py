"""What a tokenizer keeps of images, how it uses its codes, and what wrong codes do to an image."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from var_jax.evaluation.image_sets import ImageSet
from var_jax.evaluation.scores import psnr, ssim
from var_jax.models.features.lpips import Lpips, lpips
from var_jax.models.tokenizer import Tokenizer, decode_tokens, encode_images, to_float
from var_jax.schedule import Schedule, slices
from var_jax.sharding.ops import data_parallel
from var_jax.sharding.rows import in_batches, replicate

PERTURBED = 0.5  # share of the tokens that pFID replaces
NEAREST = 100 / 4096  # share of the codebook, the nearest codes, that it draws from
MOST_PSNR = 100.0  # dB, of equal images: infinity would be the mean of any set with such a pair
Compare = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


class Reconstructions:
    """A set of images as a tokenizer gives them back; what `compare` finds adds up meanwhile."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: ImageSet,
        batch_size: int = 64,
        compare: Compare = lambda images, reconstructed: {},
    ):
        self.tokenizer, self.images = tokenizer, images
        self.batch_size, self.compare = batch_size, compare

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images, `size` at a time."""
        self._sums: dict[str, float] = {}
        self._tokens: list[np.ndarray] = []
        for batch in self.images.batches(size):
            tokens = in_batches(encode_images, self.tokenizer, batch, self.batch_size)
            reconstructed = in_batches(decode_tokens, self.tokenizer, tokens, self.batch_size)
            for name, values in self.compare(batch, reconstructed).items():
                self._sums[name] = self._sums.get(name, 0) + values.sum(dtype=np.float64)
            self._tokens.append(tokens)
            yield reconstructed

    @property
    def tokens(self) -> Int32[np.ndarray, "N L"]:
        """Those of all images, once they are read."""
        return np.concatenate(self._tokens)

    def figures(self) -> dict[str, float]:
        """Once all are read: means over images of what `compare` found; use of codes by scale.

        `used_scale1` is the share of all codes that some image has there; `perplexity_scale1` the
        exponential of the entropy of their frequencies, at most the number of codes.
        """
        config = self.tokenizer.config
        hits = histograms(self.tokens, config.patch_nums, config.vocab_size)
        figures = {name: total / self.shape[0] for name, total in self._sums.items()}
        figures["used"] = (hits.sum(0) > 0).mean()
        for k, row in enumerate(hits):
            figures[f"used_scale{k + 1}"] = (row > 0).mean()
            figures[f"perplexity_scale{k + 1}"] = perplexity(row)
        return {name: float(value) for name, value in figures.items()}


class Perturbed:
    """A set of images decoded from their tokens, of which some are replaced by near ones.

    The Fréchet distance of these to the images is pFID, the perturbed FID of Qiu et al.,
    arXiv 2503.08354: it tells how a decoder takes the errors of sampling, which rFID does not. The
    paper averages over several settings; here half of the tokens, at all scales, become one of the
    nearest codes, of 4096 the nearest hundred with the token itself, so that figures compare with
    each other only.
    """

    def __init__(self, reconstructions: Reconstructions):
        self.tokenizer, self.batch_size = reconstructions.tokenizer, reconstructions.batch_size
        self.shape = reconstructions.shape
        codebook = np.asarray(self.tokenizer.quantizer.codebook[...])
        if self.tokenizer.config.codebook_znorm:  # then codes are compared by cosine
            codebook = codebook / np.linalg.norm(codebook, axis=1, keepdims=True).clip(1e-12)
        self.tokens = perturb(reconstructions.tokens, nearest_codes(codebook))

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images, `size` at a time."""
        for start in range(0, len(self.tokens), size):
            tokens = self.tokens[start : start + size]
            yield in_batches(decode_tokens, self.tokenizer, tokens, self.batch_size)


def nearest_codes(codebook: Float[np.ndarray, "V C"]) -> Int32[np.ndarray, "V n"]:
    """The nearest codes of each code, itself among them, and at least one other."""
    count = min(max(round(NEAREST * len(codebook)), 2), len(codebook))
    squared = (codebook**2).sum(1)
    near = lambda code: np.argpartition(squared - 2 * codebook @ code, count - 1)[:count]
    return np.stack([near(code) for code in codebook]).astype(np.int32)


def perturb(
    tokens: Int32[np.ndarray, "N L"], nearest: Int32[np.ndarray, "V n"], seed: int = 0
) -> Int32[np.ndarray, "N L"]:
    """Tokens, each with probability PERTURBED replaced by one of the nearest codes."""
    rng = np.random.default_rng(seed)
    replaced = rng.random(tokens.shape, np.float32) < PERTURBED
    drawn = rng.integers(0, nearest.shape[1], tokens.shape)
    return np.where(replaced, nearest[tokens, drawn], tokens)


def similarities(perceptual: Mapping[str, Lpips], batch_size: int = 64) -> Compare:
    """PSNR in dB and SSIM of pairs of images, and LPIPS under its name where there are weights."""
    weights = replicate(dict(perceptual))

    def compare(
        images: UInt8[np.ndarray, "N H W 3"], reconstructed: UInt8[np.ndarray, "N H W 3"]
    ) -> dict[str, np.ndarray]:
        pairs = {"images": images, "reconstructed": reconstructed}
        found = {
            "psnr": np.minimum(psnr(images, reconstructed), MOST_PSNR),
            "ssim": ssim(images, reconstructed),
        }
        return found | {
            name: in_batches(_lpips, each, pairs, batch_size) for name, each in weights.items()
        }

    return compare


@jax.jit
def _lpips(weights: Lpips, pairs: dict[str, UInt8[Array, "B H W 3"]]) -> Float[Array, " B"]:
    distance = lambda weights, pairs: lpips(weights, *map(to_float, pairs.values()))
    return data_parallel(distance)(weights, pairs)


def histograms(
    tokens: Int32[np.ndarray, "N L"], patch_nums: Schedule, vocab_size: int
) -> Float[np.ndarray, "K V"]:
    """How often each code occurs at each scale."""
    of_scale = lambda place: np.bincount(tokens[:, place].ravel(), minlength=vocab_size)
    return np.stack([of_scale(place) for place in slices(patch_nums)]).astype(np.float64)


def perplexity(hits: Float[np.ndarray, " V"]) -> float:
    """exp(entropy) of the frequencies."""
    share = hits[hits > 0] / hits.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
