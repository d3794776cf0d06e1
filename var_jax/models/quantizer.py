"""The multi-scale residual quantizer: VAR §3.2, algorithms 1 and 2.

A latent f is explained coarse to fine. At scale k the residual is area-averaged to p_k × q_k, each
cell takes its nearest code, the codes are upsampled to full size and smoothed by phi_k, and the
result is subtracted from the residual. All of it is float32 at highest precision: a wrong nearest
code is a wrong training target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from var_jax.config import TokenizerConfig
from var_jax.models import backend
from var_jax.models.resize import (
    area_matrix,
    bicubic_matrix,
    downsample,
    resize_all,
    upsample,
)
from var_jax.schedule import level_ids, num_tokens, phi_indices, shapes, slices

HIGHEST = jax.lax.Precision.HIGHEST


def neighbours(vocab_size: int) -> int:
    """How many codes are neighbours of a code: 100 of 4096 (RobustTok)."""
    return max(round(vocab_size * 100 / 4096), 1)


def rotation(f: Float[Array, "*B C"], f_hat: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """`f_hat` as a function of `f`: a rotation and a factor, both constant backward.

    So a gradient keeps its angle to the vector that it is of (the rotation trick: Fifty et al.,
    arXiv 2410.06424, eq. 4), where passed straight through it keeps its direction.
    """
    dot = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)
    length = lambda x: jnp.sqrt(dot(x, x)) + 1e-6
    start, end = jax.lax.stop_gradient((f, f_hat))
    factor = length(end) / length(start)
    start, end = start / length(start), end / length(end)
    middle = (start + end) / length(start + end)
    return factor * (f - 2 * dot(f, middle) * middle + 2 * dot(f, start) * end)


class Encoded(NamedTuple):
    """A latent as codes, with the vectors the codes stand for and the running sum of each scale.

    `idx` are the nearest codes; `used` make up the sums, and differ where noise replaced a code.
    """

    idx: Int32[Array, "B L"]
    used: Int32[Array, "B L"]
    residual: Float[Array, "B L C"]
    sums: list[Float[Array, "B h w C"]]


class Quantized(NamedTuple):
    """What training needs of one pass; f_hat carries the straight-through gradient."""

    f_hat: Float[Array, "B h w C"]
    idx: Int32[Array, "B L"]
    residual: Float[Array, "B L C"]
    loss: Float[Array, " B"]
    counts: Bool[Array, "B L"] | None = None  # which tokens do; None: all


class SoftCodes(NamedTuple):
    """Soft assignments of each scale: the mean entropy of one in nats, and their mean."""

    entropy: Float[Array, "B K"]
    mean: Float[Array, "B K V"]


class Quantizer(nnx.Module):
    """One codebook for all scales and a few phi convolutions shared among them."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        V, C, J = config.vocab_size, config.latent_dim, config.num_phi or len(config.patch_nums)
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (V, C)))
        bound = (9 * C) ** -0.5  # torch's default for a 3×3 convolution
        draw = lambda shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.phi_kernel = nnx.Param(draw((J, 3, 3, C, C)))
        self.phi_bias = nnx.Param(draw((J, C)))

    def nearest(self, z_BpqC: Float[Array, "B p q C"]) -> Int32[Array, "B p q"]:
        """The closest code of each cell: Euclidean, or by cosine under `codebook_znorm`."""
        codebook = self.codes()
        if self.config.codebook_znorm:
            return jnp.einsum("BpqC,VC->BpqV", z_BpqC, codebook, precision=HIGHEST).argmax(-1)
        dot = jnp.einsum("BpqC,VC->BpqV", z_BpqC, codebook, precision=HIGHEST)
        # ‖z‖² is the same for every code, so the order does not need it.
        squared = jnp.sum(codebook**2, axis=-1)[None, None, None]
        return (squared - 2 * dot).argmin(-1).astype(jnp.int32)

    def codes(self) -> Float[Array, "V C"]:
        """The codebook as distances see it: under `codebook_znorm` each code has length 1."""
        return unit(self.codebook[...]) if self.config.codebook_znorm else self.codebook[...]

    def contribution(self, k: int, code_BlC: Float[Array, "B *l C"]) -> Float[Array, "B h w C"]:
        """What scale k adds to the latent: phi_k(upsample(codes)), phi(h) = (1-r)·h + r·conv(h)."""
        j = phi_indices(len(self.config.patch_nums), self.phi_bias.shape[0])[k]
        *_, latent = sizes = shapes(self.config.patch_nums)
        h = upsample(code_BlC.reshape(len(code_BlC), *sizes[k], code_BlC.shape[-1]), latent)
        conv = backend.convolve(
            h, self.phi_kernel[j], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=HIGHEST,
        )  # fmt: skip
        ratio = self.config.phi_ratio
        return (1 - ratio) * h + ratio * (conv + self.phi_bias[j][None, None, None])

    def embed(self, idx_BL: Int32[Array, "B L"], k: int) -> Float[Array, "B l C"]:
        """The code vectors of scale k."""
        return self.codebook[...][idx_BL[:, slices(self.config.patch_nums)[k]]]

    def encode(
        self, f_BhwC: Float[Array, "B h w C"], noise_BL: Int32[Array, "B L"] | None = None
    ) -> Encoded:
        """Codes, the residuals they stand for, the running sum of each scale (algorithm 1).

        Where `noise_BL` is not -1 it is used in place of the nearest code, which `idx` keeps: the
        error stays in the residual, and finer scales make up for it (self-correction: Infinity,
        arXiv 2412.04431, §3.3).
        """
        rest, f_hat = jax.lax.stop_gradient(f_BhwC), jnp.zeros_like(f_BhwC)
        codes, used, residuals, sums = [], [], [], []
        for k, here in enumerate(slices(self.config.patch_nums)):
            z_BpqC = downsample(rest, self.config.patch_nums[k])
            idx_Bl = self.nearest(z_BpqC).reshape(len(z_BpqC), -1)
            codes.append(idx_Bl)
            residuals.append(flat(z_BpqC))
            if noise_BL is not None:
                noise_Bl = noise_BL[:, here]
                idx_Bl = jnp.where(noise_Bl >= 0, noise_Bl, idx_Bl)
            used.append(idx_Bl)
            h = self.contribution(k, self.codebook[...][idx_Bl])
            f_hat, rest = f_hat + h, rest - h
            sums.append(f_hat)
        codes, used, residuals = (jnp.concatenate(x, 1) for x in (codes, used, residuals))
        return Encoded(codes, used, residuals, sums)

    def __call__(
        self,
        f_BhwC: Float[Array, "B h w C"],
        scales_B: Int32[Array, " B"] | None = None,
        rank_BL: Int32[Array, "B L"] | None = None,
        rotate: bool = False,
    ) -> Quantized:
        """Quantizes, with each image's loss (VAR eq. 5): mean of codebook + beta · commitment.

        Of an image only the first `scales_B` scales count (quantizer dropout:
        SoundStream, arXiv 2107.03312, §III-C). Where `rank_BL` is r ≥ 0, f_hat has the neighbour of
        rank r in place of the code (latent perturbation: RobustTok, arXiv 2503.08354). The gradient
        passes straight through, or by `rotation`.
        """
        code = self.encode(f_BhwC)
        fixed = jax.lax.stop_gradient
        mean = lambda error: jnp.mean(error**2, axis=(1, 2, 3))
        losses = [
            mean(f_hat - fixed(f_BhwC)) + self.config.beta * mean(fixed(f_hat) - f_BhwC)
            for f_hat in code.sums
        ]
        sums = code.sums if rank_BL is None else self.decode(self.perturb(code.idx, rank_BL))
        if scales_B is None:
            loss, f_hat, counts_BL = jnp.mean(jnp.stack(losses), axis=0), sums[-1], None
        else:
            counts = jnp.arange(len(sums))[:, None] < scales_B[None]
            loss = jnp.mean(jnp.stack(losses), axis=0, where=counts)
            f_hat = jnp.stack(sums)[scales_B - 1, jnp.arange(len(scales_B))]
            counts_BL = jnp.array(level_ids(self.config.patch_nums))[None] < scales_B[:, None]
        f_hat = rotation(f_BhwC, f_hat) if rotate else f_BhwC + fixed(f_hat - f_BhwC)
        return Quantized(f_hat, code.idx, fixed(code.residual), loss, counts_BL)

    def soft_codes(
        self, f_BhwC: Float[Array, "B h w C"], residual_BLC: Float[Array, "B L C"]
    ) -> SoftCodes:
        """Soft assignments of the residuals that quantizing `f_BhwC` left, with gradients by both.

        They are posteriors of Gaussians around the codes, each of as large a distance as the
        nearest code has on average over the tokens of an image's scale.
        """
        fixed, codes, found = jax.lax.stop_gradient, self.codes(), []
        for here, p in zip(slices(self.config.patch_nums), self.config.patch_nums, strict=True):
            f_BlC = flat(downsample(f_BhwC, p))
            z_BlC = residual_BLC[:, here] + f_BlC - fixed(f_BlC)  # coarser codes are constants
            if self.config.codebook_znorm:
                z_BlC = unit(z_BlC)
            dot = jnp.einsum("BlC,VC->BlV", z_BlC, codes, precision=HIGHEST)
            square = lambda x: jnp.sum(x**2, axis=-1)
            distance = square(z_BlC)[..., None] - 2 * dot + square(codes)[None, None]
            nearest = fixed(distance.min(-1).mean(-1))[:, None, None].clip(1e-6)
            log_p = jax.nn.log_softmax(-0.5 * codes.shape[1] * distance / nearest)
            p_BlV = jnp.exp(log_p)
            found.append((-(p_BlV * log_p).sum(-1).mean(-1), p_BlV.mean(1)))
        return SoftCodes(*(jnp.stack(parts, 1) for parts in zip(*found, strict=True)))

    def perturb(
        self, idx_BL: Int32[Array, "B L"], rank_BL: Int32[Array, "B L"]
    ) -> Int32[Array, "B L"]:
        """Codes, replaced by the neighbour of rank r, nearest first, where r is not -1."""

        def replaced():
            nearest = self.neighbours_of_codes()
            return jnp.where(rank_BL < 0, idx_BL, nearest[idx_BL, rank_BL.clip(0)])

        return jax.lax.cond((rank_BL >= 0).any(), replaced, lambda: idx_BL)

    def neighbours_of_codes(self) -> Int32[Array, "V n"]:
        """The neighbours of each code, nearest first."""
        codebook = jax.lax.stop_gradient(self.codes())
        dot = jnp.einsum("VC,WC->VW", codebook, codebook, precision=HIGHEST)
        nearness = 2 * dot - jnp.sum(codebook**2, axis=-1)[None]
        itself = jnp.eye(len(codebook), dtype=bool)
        nearness = jnp.where(itself, -jnp.inf, nearness)
        _, nearest = jax.lax.top_k(nearness, neighbours(len(codebook)))
        return nearest

    def decode(self, idx_BL: Int32[Array, "B L"]) -> list[Float[Array, "B h w C"]]:
        """The running sum after each scale, from codes (algorithm 2)."""
        f_hat, sums = 0.0, []
        for k in range(len(self.config.patch_nums)):
            f_hat = f_hat + self.contribution(k, self.embed(idx_BL, k))
            sums.append(f_hat)
        return sums

    def next_input(self, f_hat_BhwC: Float[Array, "B h w C"], k: int) -> Float[Array, "B l C"]:
        """What the transformer reads at scale k: the running sum of all before, area-averaged."""
        return flat(downsample(f_hat_BhwC, self.config.patch_nums[k]))

    def teacher_forcing_inputs(self, idx_BL: Int32[Array, "B L"]) -> Float[Array, "B L-1 C"]:
        """The inputs of scales 2..K given all codes.

        What `decode` and `next_input` compute, all scales in the same few products: one scale after
        another takes XLA longer to compile than all of the transformer.
        """
        *coarser, (h, w) = sizes = shapes(self.config.patch_nums)
        B, C = idx_BL.shape[0], self.config.latent_dim
        if not coarser:
            return jnp.zeros((B, 0, C))
        code_BLC = self.codebook[...][idx_BL[:, : num_tokens(tuple(coarser))]]
        grow = lambda x, p, q: jnp.pad(x, ((0, 0), (0, h - p), (0, w - q), (0, 0)))
        h_KBhwC = jnp.stack([
            grow(code_BLC[:, s].reshape(B, p, q, C), p, q)
            for s, (p, q) in zip(slices(tuple(coarser)), coarser, strict=True)
        ])  # fmt: skip
        h_KBhwC = resize_all(h_KBhwC, coarser, [(h, w)] * len(coarser), bicubic_matrix)
        # phi as a product with the nine shifted copies.
        j = np.array(phi_indices(len(sizes), self.phi_bias.shape[0])[:-1])
        padded = jnp.pad(h_KBhwC, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, :, y : y + h, x : x + w] for y in range(3) for x in range(3)]
        kernel = self.phi_kernel[...][j].reshape(len(j), -1, C)
        conv = jnp.einsum(
            "KBhwN,KNC->KBhwC", jnp.concatenate(shifted, -1), kernel, precision=HIGHEST
        )
        ratio = self.config.phi_ratio
        conv = conv + self.phi_bias[...][j][:, None, None, None]
        f_hat = jnp.cumsum((1 - ratio) * h_KBhwC + ratio * conv, axis=0)
        small = resize_all(f_hat, [(h, w)] * len(coarser), sizes[1:], area_matrix)
        parts = [flat(x[:, :p, :q]) for x, (p, q) in zip(small, sizes[1:], strict=True)]
        return jnp.concatenate(parts, axis=1)


def unit(x: Float[Array, "*rest C"]) -> Float[Array, "*rest C"]:
    """Vectors at length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def flat(x_BpqC: Float[Array, "B p q C"]) -> Float[Array, "B l C"]:
    """The cells of a scale as a sequence, in raster order."""
    B, p, q, C = x_BpqC.shape
    return x_BpqC.reshape(B, p * q, C)
