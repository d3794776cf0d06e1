"""Editing keeps the tokens that the release keeps, and samples the others."""

import jax
import numpy as np
import pytest
from golden_cases import load, models
from test_autoregressive import LABELS, draw

from var_jax import BadInput
from var_jax.models.tokenizer import Tokenizer
from var_jax.sampling.autoregressive import KnownTokens
from var_jax.sampling.masks import as_mask, box_mask, enlarge_mask, known_mask, pool_mask
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512, shape_of, slices

BOXES = {"inpaint": (0.25, 0.25, 0.75, 0.75), "outpaint": (0.1, 0.2, 0.8, 0.6)}


@pytest.mark.parametrize("task", BOXES)
@pytest.mark.parametrize("size", [256, 512])
def test_golden_masks(size, task):
    patch_nums = {256: PATCH_NUMS_256, 512: PATCH_NUMS_512}[size]
    inside = box_mask(BOXES[task], patch_nums[-1])
    kept = known_mask(inside if task == "inpaint" else ~inside, patch_nums)
    np.testing.assert_array_equal(kept, load("edit_masks")[f"keep_{size}_{task}"])


def test_a_tie_of_the_bilinear_reading_falls_as_in_the_release():
    """At 13 of 16 the middle cell reads cells 7 and 8 at almost equal weight: 8 decides."""
    kept = known_mask(box_mask((0, 0, 0.5, 1), 16), PATCH_NUMS_256)
    assert kept[255:424].reshape(13, 13)[6].all()
    kept = known_mask(box_mask((0.5, 0, 1, 1), 16), PATCH_NUMS_256)
    assert not kept[255:424].reshape(13, 13)[6].any()


def test_a_mask_image_of_a_box_is_the_box():
    white = np.zeros((64, 64))
    white[16:48, 8:64] = 1
    np.testing.assert_array_equal(pool_mask(white, 16), box_mask((0.25, 0.125, 0.75, 1), 16))
    half = np.zeros((4, 4))
    half[0, :2], half[2, 0] = 1, 1  # 2 of 4 pixels, 1 of 4
    np.testing.assert_array_equal(pool_mask(half, 2), [[True, False], [False, False]])


def test_masks_of_turned_images_are_turned():
    sizes, turned = (1, (1, 2), (2, 3), (4, 6)), (1, (2, 1), (3, 2), (6, 4))
    wide, high = box_mask((0.25, 0, 0.75, 0.5), (4, 6)), box_mask((0, 0.25, 0.5, 0.75), (6, 4))
    np.testing.assert_array_equal(wide, high.T)
    np.testing.assert_array_equal(pool_mask(enlarge_mask(wide, (8, 18)) * 1.0, (4, 6)), wide)
    kept = known_mask(high, turned)
    for size, here, there in zip(sizes, slices(sizes), slices(turned), strict=True):
        h, w = shape_of(size)
        np.testing.assert_array_equal(
            known_mask(wide, sizes)[here].reshape(h, w), kept[there].reshape(w, h).T
        )


@pytest.mark.slow
def test_known_tokens_are_kept_and_the_others_sampled():
    tokenizer, _, gold = models("base")
    given = np.resize(gold["tokens"], (len(LABELS), gold["tokens"].shape[1]))
    none, everything = np.zeros(given.shape, bool), np.ones(given.shape, bool)

    free = draw(seed=3)
    same = draw(seed=3, known=KnownTokens(given, none))
    np.testing.assert_array_equal(same[1], free[1])
    np.testing.assert_array_equal(same[0], free[0])

    images, tokens = draw(seed=3, known=KnownTokens(given, everything))
    np.testing.assert_array_equal(tokens, given)
    decoded = (np.asarray(jax.jit(Tokenizer.decode)(tokenizer, given[:2])) + 1) * 127.5
    np.testing.assert_allclose(images[:2], decoded, atol=0.51)

    some = everything.copy()
    some[:, 14:] = known_mask(box_mask((0, 0, 1, 0.5), 4), (4,))
    tokens = draw(seed=3, known=KnownTokens(given, some))[1]
    np.testing.assert_array_equal(tokens[some], given[some])
    assert (tokens != given)[~some].mean() > 0.5
    assert (tokens != free[1])[~some].mean() > 0.5  # they follow from what is kept


@pytest.mark.parametrize("dtype, white", [(bool, 1), (int, 1), (float, 1), (np.uint8, 255)])
def test_masks_of_any_type_mean_the_same(dtype, white):
    values = (np.arange(12).reshape(3, 4) % 3 == 0).astype(dtype) * dtype(white)
    assert (as_mask(values) == (np.arange(12).reshape(3, 4) % 3 == 0)).all()


@pytest.mark.parametrize("values", [[[0.0, 1.5]], [[0, 256]], [[-1, 0]], [[0.0, np.nan]]])
def test_numbers_that_are_no_mask(values):
    with pytest.raises(BadInput, match="expected bool, 0 to 1, or integers 0 to 255"):
        as_mask(np.array(values))
