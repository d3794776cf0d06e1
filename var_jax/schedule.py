"""The scale schedule: the order of the tokens of one image, coarse to fine (VAR §3.1).

A schedule is the tuple `patch_nums` of side lengths, 1 first. Scale k holds `patch_nums[k]**2`
tokens; the scales follow each other in one sequence of L tokens. Everything here is static NumPy.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # L = 680
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # L = 2240
WARMUP = 0.2  # of a stage of progressive training, in which the loss of its new scale sets in


class Stage(NamedTuple):
    """A part of progressive training."""

    scales: int  # that are trained, the coarsest first
    start: int  # its first step, counted from 0
    warmup: int  # steps in which the loss of the newest scale sets in


def slices(patch_nums: tuple[int, ...]) -> tuple[slice, ...]:
    """Where each scale lies in the sequence of L tokens."""
    ends = np.cumsum([p * p for p in patch_nums]).tolist()
    return tuple(slice(end - p * p, end) for p, end in zip(patch_nums, ends, strict=True))


def num_tokens(patch_nums: tuple[int, ...]) -> int:
    """L, the length of the sequence."""
    return sum(p * p for p in patch_nums)


def level_ids(patch_nums: tuple[int, ...]) -> Int32[np.ndarray, " L"]:
    """The scale each token belongs to, 0..K-1."""
    return np.repeat(np.arange(len(patch_nums), dtype=np.int32), [p * p for p in patch_nums])


def stages(num_scales: int, share: float, steps: int) -> tuple[Stage, ...]:
    """The stages of progressive training: the coarser half of the scales, then one more at a time.

    All scales but the last join in `share` of the steps, in stages of equal length; the last stage,
    of all scales, has the rest. Without a share it is the only one.
    """
    joining = num_scales // 2 if share else 0
    length = share * steps / max(joining, 1)
    return tuple(
        Stage(num_scales - joining + i, round(length * i), round(WARMUP * length) if i else 0)
        for i in range(joining + 1)
    )


def phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which of the shared phi convolutions each scale uses: the nearest tick in [0, 1].

    Float64 throughout: at ten scales two positions lie halfway between ticks, and float32 rounds
    them to the wrong side. Official `quant.py: PhiPartiallyShared`.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    position = np.arange(num_scales) / max(num_scales - 1, 1)
    return tuple(np.abs(position[:, None] - ticks).argmin(axis=1).tolist())
