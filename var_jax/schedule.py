"""The scale schedule: the order of the tokens of one image, coarse to fine (VAR §3.1).

A schedule is the tuple `patch_nums` of side lengths, 1 first. Scale k holds `patch_nums[k]**2`
tokens; the scales follow each other in one sequence of L tokens. Everything here is static NumPy.
"""

import numpy as np
from jaxtyping import Int32

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # L = 680
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # L = 2240


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


def phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which of the shared phi convolutions each scale uses: the nearest tick in [0, 1].

    Float64 throughout: at ten scales two positions lie halfway between ticks, and float32 rounds
    them to the wrong side. Official `quant.py: PhiPartiallyShared`.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    position = np.arange(num_scales) / max(num_scales - 1, 1)
    return tuple(np.abs(position[:, None] - ticks).argmin(axis=1).tolist())
