"""The library: the same model for notebooks and commands, with a mesh and without."""

import functools
import inspect
import io
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

import var_jax
from var_jax import BadInput
from var_jax.config import parse_guidance
from var_jax.sampling.autoregressive import sample
from var_jax.sharding.mesh import AXES, make_mesh

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


def unchecked(call, *args, **kwargs):
    """A call as programs make it, without the tests' own check of types."""
    return inspect.unwrap(call)(*args, **kwargs)


@pytest.fixture(scope="module")
def model():
    return var_jax.load("emoji")


def test_samples_are_images_of_the_seed_and_their_tokens(model):
    labels = ["Flags", 2, "animals & nature"]
    images = model.sample(labels, seed=3)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, model.sample(labels, seed=3, batch_size=2))
    assert (images != model.sample(labels, seed=4)).any()
    tokens = model.sample_tokens(labels, seed=3)
    assert tokens.shape == (3, sum(side**2 for side in model.patch_nums))
    np.testing.assert_array_equal(model.decode(tokens), images)


TWICE = lambda cond, uncond, k: 2 * cond - uncond


@pytest.mark.slow
def test_guidance_may_be_a_function(model):
    """In all that draws: sampling, editing and scale by scale."""
    labels, constant = ["Flags", 2], {"cfg": 1.0, "guidance": "constant"}
    images = model.sample(labels, cfg=1.0, guidance=TWICE)
    np.testing.assert_array_equal(images, model.sample(labels, **constant))
    assert (images != model.sample(labels, cfg=1.0)).any()
    edit = functools.partial(model.edit, IMAGES[0], (0, 0, 0.5, 1), label="Flags")
    np.testing.assert_array_equal(edit(cfg=1.0, guidance=TWICE), edit(**constant))
    alone = lambda cond, uncond, k: cond if uncond is None else uncond
    np.testing.assert_array_equal(model.sample(labels, guidance=alone), model.sample(labels))
    *_, last = model.stream("Flags", cfg=1.0, guidance=TWICE)
    assert abs(last.astype(int) - images[0]).max() <= 1


def test_another_number_of_labels_seldom_compiles_another_program(model):
    images, tokens = model.sample(["Flags"] * 3, seed=3), model.encode(IMAGES[:3])
    programs = sample._cache_size()
    np.testing.assert_array_equal(model.sample(["Flags"] * 4, seed=3)[:3], images)
    np.testing.assert_array_equal(model.encode(IMAGES)[:3], tokens)
    assert sample._cache_size() == programs


def test_other_settings_compile_no_other_program(model):
    draw = functools.partial(model.sample, ["Flags"] * 3, seed=3)
    images = draw(cfg=1.5, top_k=5, top_p=0.9, temperature=1.0)
    programs = sample._cache_size()
    several = (draw(cfg=2.0, top_k=9, top_p=0.8), draw(cfg=1.5, top_k=5, top_p=0.9, temperature=2))
    assert all((each != images).any() for each in several)
    assert sample._cache_size() == programs


@pytest.mark.parametrize(
    "setting",
    [
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_transfer_guard", "disallow"),
    ],
)
def test_the_settings_of_a_notebook_change_nothing(model, setting):
    name, value = setting
    before, expected = getattr(jax.config, name), model.sample(["Flags", 2], seed=3)
    try:
        jax.config.update(name, value)
        there = var_jax.load("emoji")
        np.testing.assert_array_equal(there.sample(["Flags", 2], seed=3), expected)
        np.testing.assert_array_equal(there.encode(expected), model.encode(expected))
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize(
    "name, value", [("jax_random_seed_offset", 5), ("jax_high_dynamic_range_gumbel", True)]
)
def test_a_setting_that_cannot_be_pinned_is_refused(model, name, value):
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        with pytest.raises(BadInput, match=f"{name}={value} gives other images"):
            model.sample(["Flags"], seed=3)
    finally:
        jax.config.update(name, before)


def test_a_closed_image_is_refused(model):
    image = Image.new("RGB", (32, 32))
    image.close()
    with pytest.raises(BadInput, match="image cannot be read"):
        model.crop(image)


@pytest.mark.slow
def test_a_mesh_changes_nothing(model):
    labels = ["Flags"] * 3
    mesh = make_mesh(4, 2, 1)
    there, images = var_jax.load("emoji", mesh=mesh), model.sample(labels, seed=1)
    np.testing.assert_array_equal(there.sample(labels, seed=1), images)
    tokens = model.encode(images)
    np.testing.assert_array_equal(there.encode(images), tokens)
    np.testing.assert_array_equal(there.decode(tokens), model.decode(tokens))
    steps = model.coarse_to_fine(tokens)
    np.testing.assert_array_equal(there.coarse_to_fine(tokens), steps)
    given = model.log_likelihood(tokens, labels)
    np.testing.assert_allclose(there.log_likelihood(tokens, labels), given, rtol=1e-4)
    edit = lambda model: model.edit(images[0], (0, 0, 0.5, 1), label="Flags", seed=2)
    np.testing.assert_array_equal(edit(there), edit(model))
    with jax.set_mesh(mesh):  # that which is set
        assert var_jax.load("emoji").mesh == mesh


def test_a_notebook_shows_a_grid(model):
    png = model.sample(["Flags"] * 3)._repr_png_()
    assert Image.open(io.BytesIO(png)).size == (3 * 96 + 4, 96)
    images = model.sample(["Flags"] * 3)
    assert images[0, 0]._repr_png_() is None  # a row of pixels is no image
    assert images[:0]._repr_png_() is None and images._repr_jpeg_() is None
    photographs = np.zeros((2, 256, 256, 3), np.uint8).view(var_jax.Images)
    shown = Image.open(io.BytesIO(photographs._repr_jpeg_()))
    assert shown.format == "JPEG" and shown.size == (2 * 256 + 2, 256)
    assert photographs._repr_png_() is None


def test_a_notebook_prints_a_model_in_one_line(model):
    assert repr(model).startswith("Model(32 px, 9 classes, depth 6") and len(repr(model)) < 120
    assert type(model.sample(["Flags"] * 3).mean()) is np.float64


def test_coarse_to_fine_ends_in_the_image(model):
    tokens = model.encode(model.sample(["Symbols", "Objects", "Flags"]))
    steps = model.coarse_to_fine(tokens)
    assert steps.shape == (3, len(model.patch_nums), 32, 32, 3)
    np.testing.assert_array_equal(steps[:, -1], model.decode(tokens))
    shown = Image.open(io.BytesIO(steps._repr_png_())).size
    assert shown == (98 * len(model.patch_nums) - 2, 98 * 3 - 2)  # a row for each image


@pytest.mark.slow
def test_samples_are_likelier_under_their_own_class(model):
    labels = ["Flags", "Smileys & Emotion", 2]
    images = model.sample(labels, seed=3)
    given = model.log_likelihood(images, labels)
    assert given.shape == (3, len(model.patch_nums)) and (given < 0).all()
    np.testing.assert_array_equal(given, model.log_likelihood(model.encode(images), labels))
    np.testing.assert_array_equal(given[:1], model.log_likelihood(images, "Flags")[:1])
    for other in (None, labels[::-1]):
        assert (given.sum(1) >= model.log_likelihood(images, other).sum(1)).all()


@pytest.mark.slow
def test_an_edit_keeps_what_lies_outside(model):
    image = model.sample(["Smileys & Emotion"] * 3, seed=1)[0]
    half = (0.0, 0.0, 1.0, 0.5)
    made = model.edit(image, half, label="Flags", num=2, seed=5)
    assert made.shape == (2, 32, 32, 3) and (made[0] != made[1]).any()
    again = model.edit(image, np.arange(32)[None] < np.full((32, 1), 16), label=8, num=2, seed=5)
    np.testing.assert_array_equal(again, made)
    unchanged = np.asarray(model.decode(model.encode(image)))
    moved = np.abs(np.asarray(made).astype(int) - unchanged).mean((0, 1, 3))
    assert moved[8:16].mean() > 6 * moved[24:].mean()  # phi and the decoder reach over the border


@pytest.mark.slow
def test_a_stream_ends_in_the_sample_or_the_edit(model):
    stages = list(model.stream("Flags", seed=3, cfg=2, top_k=50, top_p=0.9))
    assert len(stages) == len(model.patch_nums) and stages[0].shape == (32, 32, 3)
    sample = model.sample("Flags", seed=3, cfg=2, top_k=50, top_p=0.9)
    np.testing.assert_allclose(stages[-1].astype(int), sample[0].astype(int), atol=1)
    *_, edited = model.stream(None, stages[-1], (0, 0, 1, 0.5), seed=5)
    expected = model.edit(np.asarray(stages[-1]), (0, 0, 1, 0.5), seed=5)[0]
    np.testing.assert_allclose(edited.astype(int), expected.astype(int), atol=1)
    with pytest.raises(BadInput, match="seed=-1"):
        next(model.stream("Flags", seed=-1))


@pytest.mark.slow
def test_between_the_images_of_a_stream_settings_are_the_callers(model):
    with jax.enable_x64(True):
        for _ in model.stream("Flags"):
            assert jax.numpy.zeros(1).dtype == np.float64


def test_any_image_is_cropped_to_the_models_size(model, tmp_path):
    Image.new("RGB", (90, 50), "red").save(tmp_path / "a.png")
    image = model.crop(tmp_path / "a.png")
    assert image.shape == (32, 32, 3) and image.flags.writeable
    for shape in ((40, 64, 3), (40, 64), (40, 64, 4)):
        assert model.crop(np.zeros(shape, np.uint8)).shape == (32, 32, 3)
    assert model.crop(Image.new("L", (90, 50))).shape == (32, 32, 3)


def test_an_opened_image_is_cropped_as_its_file_is(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # shown upside down
    for image in (
        Image.fromarray(np.full((40, 50), 30_000, np.uint16)),
        Image.new("RGBA", (50, 40), (255, 0, 0, 0)),
        Image.fromarray(IMAGES[0]),
    ):
        image.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as opened:
            np.testing.assert_array_equal(model.crop(opened), model.crop(tmp_path / "a.png"))


def test_a_label_of_no_dimension_is_that_label(model):
    for label in (np.array(8), jax.numpy.array(8)):
        assert unchecked(type(model).class_index, model, label) == 8


def test_a_model_without_a_mesh_says_so_where_one_is_set(model):
    with jax.set_mesh(make_mesh(8, 1, 1)), pytest.raises(BadInput, match="loaded without one"):
        model.sample("Flags")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: var_jax.load("nowhere"), "nowhere is not a checkpoint: it does not exist"),
        (lambda m: m.sample(["Cars"]), "label holds 'Cars'; the classes of this checkpoint are"),
        (lambda m: m.sample([9]), "label holds 9; classes are 0 to 8"),
        (lambda m: m.sample([]), "no labels are given"),
        (lambda m: m.sample([True]), "label holds True; expected a class name"),
        (lambda m: m.sample("Flags", seed=-1), "seed=-1; expected"),
        (lambda m: m.sample("Flags", seed=2**32), "0 to 4294967295"),
        (lambda m: m.sample("Flags", cfg=1e9), r"cfg=1000000000\.0; expected 0 to 1000"),
        *(
            (lambda m, size=size: unchecked(type(m).encode, m, IMAGES, batch_size=size), sentence)
            for size, sentence in ((0, "size=0; ex"), (1.5, "size=1.5; ex"), ("8", "size='8'; ex"))
        ),
        *(
            (lambda m, path=path: unchecked(var_jax.load, path), f"checkpoint is {path!r}; expec")
            for path in (None, 3, b"emoji")
        ),
        *(
            (lambda m, shape=shape: m.crop(np.zeros(shape, np.uint8)), "image is uint8 of shape")
            for shape in ((9, 9, 1), (9, 9, 5), (3, 9, 9))
        ),
        (lambda m: unchecked(type(m).crop, m, [[1], [1, 2]]), "image cannot be read as an array"),
        (lambda m: unchecked(type(m).encode, m, [[1], [1, 2]]), "images cannot be read as an arr"),
        (lambda m: unchecked(type(m).decode, m, [[1], [1, 2]]), "tokens cannot be read as an arr"),
        (lambda m: unchecked(type(m).sample, m, [["Flags"], [1, 2]]), "labels cannot be read as"),
        (
            lambda m: unchecked(
                type(m).edit_tokens, m, IMAGES[0], np.full((32, 32), "a"), settings=m.settings()
            ),
            "the mask is <U1; expected bool",
        ),
        (lambda m: m.edit(IMAGES[0], (0, 0, 1, 1), num=2**40), "; expected 1 to 10000"),
        (lambda m: m.log_likelihood(np.zeros((2, 123), int), [0, 1, 2]), "3 labels for 2 images"),
        (lambda m: m.log_likelihood(np.zeros((2, 7), int)), r"tokens are int64 of shape \(2, 7\)"),
        (lambda m: m.crop(np.zeros((0, 9, 3), np.uint8)), r"image is uint8 of shape \(0, 9, 3\)"),
        (lambda m: m.crop(Image.new("F", (9, 9))), "floating-point pixels have no known range"),
        (lambda m: m.crop(Image.new("RGB", (0, 5))), r"image has the size \(0, 5\)"),
        (lambda m: m.sample("Flags", seed=10**5000), "seed=a number of thousands of digits"),
        (lambda m: m.sample("Flags", top_k=[10**5000]), "top_k=a number of thousands of digits"),
        (lambda m: m.edit(IMAGES[0], (False, False, True, True)), "repaint=.*; expected numbers"),
        (
            lambda m: var_jax.load("emoji", mesh=Mesh(np.reshape(jax.devices(), (8, 1, 1)), AXES)),
            "has other axes than explicit",
        ),
        (lambda m: var_jax.load("emoji", mesh=make_mesh(1, 1, 8)), "num_heads=4 cannot be split"),
        (
            lambda m: m.edit(np.zeros((32, 32, 3), np.uint8), (0, 0, 1.5, 1)),
            "expected y0,x0,y1,x1 with 0 <= y0 < y1",
        ),
        (
            lambda m: var_jax.load("emoji", mesh=jax.make_mesh((8,), ("x",))),
            "has other axes than explicit",
        ),
        (lambda m: m.sample(np.array([99])), "label holds 99; classes are 0 to 8"),
        (lambda m: m.sample("Flags", batch_size=0), "batch_size=0; expected a whole number"),
        (lambda m: m.decode(np.zeros((1, 7), np.int32)), r"tokens are int32 of shape \(1, 7\)"),
        (
            lambda m: m.decode(np.full((1, 123), 9999)),
            "tokens hold 9999 to 9999; expected 0 to 2047",
        ),
        (lambda m: m.edit(np.zeros((2, 32, 32, 3), np.uint8), (0, 0, 1, 1)), "image has the shape"),
        (lambda m: m.edit(np.zeros((32, 32, 3), np.uint8), (0, 0, 1)), r"repaint has shape \(3,\)"),
        (lambda m: m.sample("Flags", top_p=[0.5, 0.5]), r"top_p=0\.5,0\.5 has 2 numbers"),
        (lambda m: m.sample("Flags", top_k=[5, 5]), r"top_k=5,5 has 2 numbers"),
        (
            lambda m: m.sample("Flags", temperature=1e9),
            "temperature=1000000000.0; expected",
        ),
        (lambda m: m.sample("Flags", guidance="none"), "guidance='none'; expected ramp"),
        (lambda m: unchecked(parse_guidance, 0.5), r"guidance='0\.5'; expected ramp"),
        (lambda m: m.sample("Flags", top_k=10**400), "expected numbers"),
        (lambda m: m.sample("Flags", refiner=m), "refiner and draft_scales go together"),
        (lambda m: m.sample("Flags", refiner=m, draft_scales=12), "draft_scales=12; expected 1 to"),
        (
            lambda m: m.sample("Flags", guidance="constant"),
            "guidance=constant is of cfg, the",
        ),
        (lambda m: m.sample("Flags", cfg=-1.0), r"cfg=-1\.0; expected 0 to 1000"),
        (lambda m: m.encode(np.zeros((1, 9, 9, 3), np.uint8)), r"expected uint8 \(N, 32, 32, 3\)"),
        (lambda m: m.encode(np.zeros((1, 32, 32, 3), np.float32)), "images are float32 of shape"),
        (
            lambda m: m.edit(np.zeros((32, 32, 3), np.uint8), (0.0, 0.0, 0.01, 1.0)),
            "nothing is left",
        ),
    ],
)
def test_bad_input(model, call, sentence):
    with pytest.raises(BadInput, match=sentence):
        call(model)


# docs/reference/api.md calls these stable: the old form of what changes works for a version more.
SMOOTH = "smooth=False, refiner=None, draft_scales=None"
DRAWN = "seed=0, cfg=None, top_k=None, top_p=None, temperature=None, guidance=None"
SIGNATURES = {
    "load": "(checkpoint, *, mesh=None, dtype='auto')",
    "sample": f"(self, labels, *, {DRAWN}, steps=None, solver=None, {SMOOTH}, batch_size=64)",
    "at_schedule": "(self, patch_nums)",
    "load_refiner": "(self, checkpoint, *, dtype='auto')",
    "sampler": f"(self, settings, {SMOOTH})",
    "sample_tokens": f"(self, labels, *, {DRAWN}, batch_size=64)",
    "encode": "(self, images, *, batch_size=64)",
    "decode": "(self, tokens, *, batch_size=64)",
    "coarse_to_fine": "(self, tokens)",
    "log_likelihood": "(self, images, labels=None, *, batch_size=64)",
    "edit": f"(self, image, repaint, *, label=None, num=1, {DRAWN}, smooth=False, batch_size=8)",
    "edit_tokens": "(self, image, repaint, *, settings, label=None, num=1, seed=0, smooth=False,"
    " batch_size=8)",
    "stream": f"(self, label=None, image=None, repaint=None, *, {DRAWN})",
    "crop": "(self, image)",
    "settings": f"(self, {DRAWN.removeprefix('seed=0, ')}, steps=None, solver=None)",
    "check_kind": "(self, what, *kinds)",
    "class_index": "(self, label, name='label')",
    **dict.fromkeys(("class_names", "image_size", "kind", "mesh", "patch_nums"), ""),
}


def signature(call):
    """Names, kinds and defaults of the arguments."""
    parameters = inspect.signature(call).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def test_signatures_are_stable():
    public = {name: each for name, each in vars(var_jax.Model).items() if name[0] != "_"}
    public["load"] = var_jax.load
    found = {name: signature(each) if callable(each) else "" for name, each in public.items()}
    assert found == SIGNATURES


def test_importing_is_light_and_defines_no_flags():
    """Commands and library side by side, as in a notebook."""
    commands = "train, sample, edit, encode, convert, prepare, aot, demo"
    code = f"""
import sys, var_jax
assert not {{"jax", "sklearn", "tensorboardX", "matplotlib"}} & set(sys.modules), "import var_jax"
from absl import flags
from var_jax import {commands}, api
heavy = {{"sklearn", "tensorboardX", "matplotlib", "tensorflow"}} & set(sys.modules)
assert not heavy, heavy
assert "checkpoint" not in flags.FLAGS and "config" not in flags.FLAGS
"""
    subprocess.run([sys.executable, "-c", code], check=True)
