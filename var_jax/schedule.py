"""The scale schedule: the order of the tokens of one image, coarse to fine (VAR §3.2).

A schedule is the tuple `patch_nums` of the sizes of the scales in tokens, 1 first: a side if the
scale is square, else (height, width). The scales follow each other in one sequence of L tokens,
each in raster order. Nothing else knows how a size is written. Everything here is static NumPy.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

Shape = tuple[int, int]  # height, width
Size = int | Shape  # of an image, a latent or a scale: a side if it is square, else its shape
Schedule = tuple[Size, ...]

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # L = 680
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # L = 2240
WARMUP = 0.2  # of a stage of progressive training, in which the loss of its new scale sets in


class Stage(NamedTuple):
    """A part of progressive training."""

    scales: int  # that are trained, the coarsest first
    start: int  # its first step, counted from 0
    warmup: int  # steps in which the loss of the newest scale sets in


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which tokens see which: those of a block its own and those of the blocks before it."""

    blocks: tuple[int, ...]  # their lengths
    window: int = 0  # blocks that are seen, the own one included; 0: all

    @classmethod
    def block_causal(cls, patch_nums: Schedule, window: int = 0) -> "Pattern":
        """A block for each scale: VAR."""
        return cls(lengths(patch_nums), window)

    @classmethod
    def full(cls, length: int) -> "Pattern":
        """One block: every token sees all, as in a diffusion transformer."""
        return cls((length,))

    @property
    def length(self) -> int:
        return sum(self.blocks)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each block ends."""
        return tuple(itertools.accumulate(self.blocks))

    @functools.cached_property
    def seen(self) -> tuple[slice, ...]:
        """The tokens that those of each block see."""
        starts = (0, *self.ends)
        first = lambda k: starts[max(k + 1 - self.window, 0)] if self.window else 0
        return tuple(slice(first(k), end) for k, end in enumerate(self.ends))

    @property
    def pairs(self) -> int:
        """Pairs of a token and one that it sees."""
        return sum(l * (s.stop - s.start) for l, s in zip(self.blocks, self.seen, strict=True))

    def mask(self) -> Bool[np.ndarray, "L L"]:
        """Whether the query of a row sees the key of a column."""
        seen = np.array([(s.start, s.stop) for s in self.seen])
        first, end = np.repeat(seen, self.blocks, axis=0).T[..., None]
        keys = np.arange(self.length)
        return (first <= keys) & (keys < end)

    def left(self, k: int) -> int:
        """How many tokens block `k` leaves in a cache: those that the next block sees."""
        if not 0 <= k < len(self.blocks) - 1:
            return 0
        return self.ends[k] - self.seen[k + 1].start

    def room(self, count: int) -> int:
        """Room that a cache needs to predict the first `count` blocks."""
        return max(map(self.left, range(count - 1)), default=0)


def shape_of(size: Size) -> Shape:
    """Height and width."""
    return size if isinstance(size, tuple) else (size, size)


def size_of(shape: Size) -> Size:
    """The one way in which configs and files say a size: a side if it is square."""
    height, width = shape_of(shape)
    return height if height == width else (height, width)


def name_of(size: Size) -> str:
    """A size in a sentence: "256 x 384", height first."""
    return " x ".join(map(str, shape_of(size)))


def px(size: Size) -> str:
    """The size of images, short: "256 px", or "256 x 384 px"."""
    return f"{size if isinstance(size, int) else name_of(size)} px"


def shapes(patch_nums: Schedule) -> tuple[Shape, ...]:
    """Height and width of each scale."""
    return tuple(map(shape_of, patch_nums))


def lengths(patch_nums: Schedule) -> tuple[int, ...]:
    """The number of tokens of each scale."""
    return tuple(height * width for height, width in shapes(patch_nums))


def slices(patch_nums: Schedule) -> tuple[slice, ...]:
    """Where each scale lies in the sequence of L tokens."""
    ends = itertools.accumulate(lengths(patch_nums))
    return tuple(slice(end - l, end) for l, end in zip(lengths(patch_nums), ends, strict=True))


def num_tokens(patch_nums: Schedule) -> int:
    """L, the length of the sequence."""
    return sum(lengths(patch_nums))


def level_ids(patch_nums: Schedule) -> Int32[np.ndarray, " L"]:
    """The scale each token belongs to, 0..K-1."""
    return np.repeat(np.arange(len(patch_nums), dtype=np.int32), lengths(patch_nums))


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
