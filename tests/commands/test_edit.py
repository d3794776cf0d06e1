"""`var_jax.edit` from outside: what it leaves, what it says to bad input."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from running import complaint, run

from var_jax import BadInput
from var_jax.data.decoding import crop
from var_jax.edit import read_mask
from var_jax.sampling.masks import box_mask, known_mask
from var_jax.tools.npz import load_npz

SCALES = (1, 2, 4)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "wide.png"
    pixels = np.random.default_rng(0).integers(0, 255, (48, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_box_and_paste(untrained, photo, tmp_path):
    flags = ("--image", photo, "--task", "outpaint", "--box", ".25,0,.75,.5", "--paste")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result_2.png").write_bytes(b"of an edit with --num 3")
    code, _, err = run("edit", "--checkpoint", untrained, *flags, "--out", tmp_path / "out")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "edit.npz", "result.png", "strip.png",
    ]  # fmt: skip
    result = np.asarray(Image.open(tmp_path / "out" / "result.png"))
    outside = ~box_mask((0.25, 0, 0.75, 0.5), 16)
    original = crop(Image.open(photo), 16, resize=1)
    np.testing.assert_array_equal(result[~outside], original[~outside])
    assert (result != original)[outside].mean() > 0.5
    arrays = load_npz(tmp_path / "out" / "edit.npz")
    np.testing.assert_array_equal(arrays["arr_0"], result[None])
    np.testing.assert_array_equal(arrays["keep"], known_mask(outside[::4, ::4], SCALES))


@pytest.mark.slow
def test_mask_and_class(untrained, photo, tmp_path):
    white = np.zeros((24, 30), np.uint8)
    white[:, 15:] = 255  # the right half, of a mask half as large
    Image.fromarray(white).save(tmp_path / "mask.png")
    flags = ("--mask", tmp_path / "mask.png", "--task", "class", "--label", "flags", "--num", 3)
    out = tmp_path / "out"
    code, _, err = run("edit", "--checkpoint", untrained, "--image", photo, *flags, "--out", out)
    assert code == 0, err
    arrays = load_npz(out / "edit.npz")
    right = box_mask((0, 0.5, 1, 1), SCALES[-1])
    np.testing.assert_array_equal(arrays["keep"], known_mask(right, SCALES))
    kept = arrays["tokens"][:, arrays["keep"] == 1]
    assert arrays["tokens"].shape == (3, 21) and (kept == kept[0]).all()
    assert len(np.unique(arrays["tokens"], axis=0)) == 3
    assert Image.open(out / "result_2.png").size == (16, 16)
    assert Image.open(out / "strip.png").width > 5 * 96


@pytest.mark.slow
def test_sampled_with_the_settings_of_the_checkpoint(untrained, photo, tmp_path):
    copy = shutil.copytree(untrained, tmp_path / "copy")
    about = json.loads((copy / "config.json").read_text())
    del about["checksums"]
    about["sampling"] = {"cfg": 3.0, "top_k": 5, "top_p": [1, 0.9, 0.7]}
    (copy / "config.json").write_text(json.dumps(about))
    given = ("--cfg", 3, "--top_k", 5, "--top_p", "1,.9,.7")
    shared = ("--image", photo, "--box", "0,0,1,1", "--label", 3)

    def tokens(checkpoint, out, *flags):
        flags = ("--checkpoint", checkpoint, "--out", tmp_path / out, *shared, *flags)
        code, _, err = run("edit", *flags)
        assert code == 0, err
        return load_npz(tmp_path / out / "edit.npz")["tokens"]

    by_itself = tokens(copy, "a")
    np.testing.assert_array_equal(by_itself, tokens(untrained, "b", *given))
    assert (by_itself != tokens(copy, "c", "--top_k", 0)).any()


def test_bad_input(untrained, photo, tmp_path):
    Image.new("L", (10, 10)).save(tmp_path / "mask.png")
    box, image, out = ("--box", "0,0,1,1"), ("--image", photo), tmp_path / "out"
    said = {
        ("--image", "nowhere.png", *box): "--image=nowhere.png cannot be read: No such file",
        ("--image", __file__, *box): "cannot be read: no image in a known format",
        (*image, "--box", ".5,0,.5,1"): "--box=.5,0,.5,1; expected y0,x0,y1,x1 with 0 <= y0 < y1",
        (*image, "--box", "0,0,1"): "--box=0,0,1; expected",
        image: "say what to repaint: either --box or --mask",
        (*image, "--box", "0,0,.1,.1"): "--box leaves nothing to repaint on the 4 x 4 cells",
        (*image, "--mask", tmp_path / "mask.png"): "--mask is 10 x 10 pixels, --image 60 x 48",
        (*image, "--mask", photo, "--task", "outpaint"): "--task=outpaint goes with --box",
        (*image, *box, "--task", "class"): "--task=class needs --label",
        (*image, *box, "--label", "dogs"): "--label holds 'dogs'; the classes of",
        (*image, *box, "--num", 0): "--num",
        (*image, *box, "--cfg", 4): "--cfg=4 strengthens the class of --label, which is not given",
        (*image, *box, "--top_p", ".5,.4"): "top_p=0.5,0.4 has 2 numbers; expected one",
    }
    for flags, expected in said.items():
        assert expected in complaint("edit", "--checkpoint", untrained, "--out", out, *flags)
    assert not out.exists()


def save_mask(path, kind):
    """A mask of the right half, drawn in one of the ways that people do."""
    right = np.arange(60)[None] >= np.full((48, 1), 30)
    grey = Image.fromarray(np.where(right, 255, 0).astype(np.uint8))
    drawn = {
        "grey": grey,
        "1-bit": grey.convert("1"),
        "palette": grey.convert("P"),
        "16-bit": Image.fromarray(np.where(right, 65535, 0).astype(np.uint16)),
        "of ones": Image.fromarray(right.astype(np.uint8)),
        "opaque": Image.merge("LA", (grey, Image.new("L", grey.size, 255))).convert("RGBA"),
        "grey and alpha": Image.merge("LA", (grey, grey)),
        "hole": Image.merge("RGBA", (*Image.new("RGB", grey.size, "red").split(), grey)),
    }
    drawn[kind].save(path)
    return path


@pytest.mark.parametrize("kind", ["grey", "1-bit", "palette", "16-bit", "of ones", "opaque"])
def test_masks_of_any_kind_mean_the_same(photo, tmp_path, kind):
    mask = read_mask(str(save_mask(tmp_path / "mask.png", kind)), Image.open(photo))
    assert (np.asarray(mask)[:, :, 0] == np.where(np.arange(60) >= 30, 255, 0)).all()


@pytest.mark.parametrize("kind", ["grey and alpha", "hole"])
def test_transparent_masks_may_mean_two_things(photo, tmp_path, kind):
    path = save_mask(tmp_path / "mask.png", kind)
    with pytest.raises(
        BadInput, match=r"mask\.png is transparent in places, which may mean to rep"
    ):
        read_mask(str(path), Image.open(photo))
