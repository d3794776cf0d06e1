"""What users of the library pass to it."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from var_jax import BadInput
from var_jax.sampling.arguments import as_array, to_numbers


def test_numbers_of_any_kind():
    assert to_numbers("x", 2) == (2.0,) and to_numbers("x", np.float32(0.5)) == (0.5,)
    for several in ([1, 0.5], (1, 0.5), np.array([1, 0.5]), jnp.array([1, 0.5], jnp.bfloat16)):
        assert to_numbers("x", several) == (1.0, 0.5)


@pytest.mark.parametrize(
    "value",
    [True, "1", b"1", ["1.5"], 1j, [], [[1]], None, np.nan, [1, np.inf], np.datetime64("2020")],
)
def test_what_is_no_number(value):
    with pytest.raises(BadInput, match=r"x=.*; expected numbers"):
        to_numbers("x", value)


def test_pil_images_of_any_mode_are_read_in_rgb():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    palette = Image.fromarray(pixels).quantize(256)
    for image in (palette, palette.convert("HSV"), palette.convert("RGBA"), palette.convert("L")):
        rgb = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(as_array("images", image), rgb)
        np.testing.assert_array_equal(as_array("images", [image, rgb]), [rgb, rgb])
    with pytest.raises(BadInput, match=r"images cannot be read .*no known range"):
        as_array("images", Image.new("F", (8, 8)))
