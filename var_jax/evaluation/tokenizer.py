"""What a tokenizer keeps of images, and how it uses its codes."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int32, UInt8

from var_jax.evaluation.features import ImageSet
from var_jax.evaluation.scores import psnr, ssim
from var_jax.models.tokenizer import Tokenizer, decode_tokens, encode_images
from var_jax.schedule import slices
from var_jax.sharding.rows import in_batches


class Reconstructions:
    """A set of images as a tokenizer gives them back; what is lost adds up as they are read."""

    def __init__(self, tokenizer: Tokenizer, images: ImageSet, batch_size: int = 64):
        self.tokenizer, self.images, self.batch_size = tokenizer, images, batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
        """All images, `size` at a time."""
        config = self.tokenizer.config
        self._psnr = self._ssim = 0.0
        self._hits = np.zeros((len(config.patch_nums), config.vocab_size))
        for batch in self.images.batches(size):
            tokens = in_batches(encode_images, self.tokenizer, batch, self.batch_size)
            made = in_batches(decode_tokens, self.tokenizer, tokens, self.batch_size)
            self._psnr += psnr(batch, made).sum()
            self._ssim += ssim(batch, made).sum(dtype=np.float64)
            self._hits += histograms(tokens, config.patch_nums, config.vocab_size)
            yield made

    def figures(self) -> dict[str, float]:
        """Once all are read: PSNR in dB and SSIM, means over images; use of the codes by scale.

        `used_scale1` is the share of all codes that some image has there; `perplexity_scale1` the
        exponential of the entropy of their frequencies, at most the number of codes.
        """
        hits, count = self._hits, self.shape[0]
        figures = {"psnr": self._psnr / count, "ssim": self._ssim / count}
        figures["used"] = (hits.sum(0) > 0).mean()
        for k, row in enumerate(hits):
            figures[f"used_scale{k + 1}"] = (row > 0).mean()
            figures[f"perplexity_scale{k + 1}"] = perplexity(row)
        return {name: float(value) for name, value in figures.items()}


def histograms(
    tokens: Int32[np.ndarray, "N L"], patch_nums: tuple[int, ...], vocab_size: int
) -> Float[np.ndarray, "K V"]:
    """How often each code occurs at each scale."""
    of_scale = lambda place: np.bincount(tokens[:, place].ravel(), minlength=vocab_size)
    return np.stack([of_scale(place) for place in slices(patch_nums)]).astype(np.float64)


def perplexity(hits: Float[np.ndarray, " V"]) -> float:
    """exp(entropy) of the frequencies."""
    share = hits[hits > 0] / hits.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
