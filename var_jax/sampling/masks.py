"""Which tokens an edit keeps, at every scale (VAR, appendix B, and the release's notebook).

A mask on the finest scale says what to repaint; the other scales follow from it. The tokens to keep
are the image's own (`autoregressive.KnownTokens`), all others are sampled.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped

from var_jax import BadInput
from var_jax.schedule import Schedule, Size, shape_of, shapes

Box = tuple[float, float, float, float]  # y0, x0, y1, x1, fractions of the image


def as_box(given: str, edges: Sequence[float]) -> Box:
    """Four numbers as a box. Raises: BadInput, which begins with `given`, if they are none."""
    if len(edges) == 4:
        y0, x0, y1, x1 = edges
        if 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1:
            return y0, x0, y1, x1
    raise BadInput(
        f"{given}; expected y0,x0,y1,x1 with 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1, fractions of"
        " the image."
    )


def box_mask(box: Box, size: Size) -> Bool[np.ndarray, "h w"]:
    """True inside the box, whose edges are rounded to whole cells (halves to even)."""
    shape = shape_of(size)
    y0, x0, y1, x1 = (round(edge * side) for edge, side in zip(box, 2 * shape, strict=True))
    mask = np.zeros(shape, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def as_mask(values: Shaped[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """A mask of numbers 0 to 1: of bool, of such numbers, or of integers up to 255.

    Integers of which none is above 1 count as they are, so that masks of 0 and 1 mean what they do.

    Raises: BadInput if they are no numbers, or one is out of range.
    """
    if values.dtype.kind not in "biuf":
        raise BadInput(f"the mask is {values.dtype}; expected bool, 0 to 1, or integers 0 to 255.")
    numbers = values.astype(np.float32)
    if np.issubdtype(values.dtype, np.integer) and values.max(initial=0) > 1:
        numbers = numbers / 255
    if not ((numbers >= 0) & (numbers <= 1)).all():
        raise BadInput(
            f"the mask is {values.dtype} from {values.min()} to {values.max()}; expected bool, 0 to"
            " 1, or integers 0 to 255."
        )
    return numbers


def pool_mask(mask: Float[np.ndarray, "H W"], size: Size) -> Bool[np.ndarray, "h w"]:
    """True where the mean of a cell of `size` cells is at least 1/2; they divide H and W."""
    (H, W), (h, w) = mask.shape, shape_of(size)
    return mask.reshape(h, H // h, w, W // w).mean((1, 3)) >= 0.5


def enlarge_mask(mask: Bool[np.ndarray, "h w"], size: Size) -> Bool[np.ndarray, "H W"]:
    """Cells as pixels of an image of `size`, the inverse of `pool_mask`."""
    (H, W), (h, w) = shape_of(size), mask.shape
    return mask.repeat(H // h, 0).repeat(W // w, 1)


def known_mask(repaint: Bool[np.ndarray, "h w"], patch_nums: Schedule) -> Bool[np.ndarray, " L"]:
    """The tokens to keep, scales concatenated, from the cells of the finest scale to repaint.

    A token is kept where the mask of kept cells, read bilinearly at its centre, is above 1/2. The
    one token of scale 1 is always kept.
    """
    keep = (~repaint).astype(np.float32)
    scales = []
    for shape in shapes(patch_nums):
        rows, columns = map(bilinear_matrix, keep.shape, shape)
        scales.append((rows @ keep @ columns.T > 0.5).ravel() if shape != (1, 1) else [True])
    return np.concatenate(scales)


def bilinear_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "out in"]:
    """Linear interpolation as torch does it: half-pixel centres, no antialiasing.

    Positions are rounded once, as its fused multiply-add does: ties at 1/2 depend on that.
    """
    ratio = np.float64(np.float32(size_in) / np.float32(size_out))
    at = np.maximum(ratio * (np.arange(size_out) + 0.5) - 0.5, 0).astype(np.float32)
    below = at.astype(int)
    weight = at - below.astype(np.float32)
    matrix, rows = np.zeros((size_out, size_in), np.float32), np.arange(size_out)
    matrix[rows, below] = 1 - weight
    np.add.at(matrix, (rows, np.minimum(below + 1, size_in - 1)), weight)
    return matrix
