"""A trained model sampled at other scales."""

import numpy as np
import pytest

import var_jax
from var_jax.config import SamplingConfig
from var_jax.models.other_schedule import sampling_at
from var_jax.sharding.mesh import make_mesh

LABELS = [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def emoji():
    return var_jax.load("emoji")


@pytest.mark.slow
def test_its_own_schedule_changes_nothing(emoji):
    again = emoji.at_schedule(emoji.patch_nums)
    np.testing.assert_array_equal(again.sample(LABELS), emoji.sample(LABELS))


def test_settings_of_each_scale_follow_the_nearest_scale(emoji):
    fewer = emoji.at_schedule((1, 2, 4))
    top_p = emoji.models.sampling.top_p
    assert len(top_p) == len(emoji.patch_nums) == 12
    assert fewer.models.sampling.top_p == (top_p[0], top_p[6], top_p[11])


def test_an_interval_of_guidance_keeps_its_place():
    settings = SamplingConfig(guidance="interval=4-9")
    ten, five = tuple(range(1, 11)), (1, 3, 5, 7, 10)
    assert sampling_at(settings, ten, five).guidance == "interval=2-5"
    assert sampling_at(settings, ten, ten) == settings
    assert sampling_at(SamplingConfig(), ten, five) == SamplingConfig()


@pytest.mark.slow
def test_other_sizes_have_other_images(emoji):
    wide = emoji.at_schedule((1, 2, (2, 3), (4, 6)))
    assert wide.image_size == (32, 48)
    tokens = wide.sample_tokens(LABELS[:2])
    assert wide.decode(tokens).shape == wide.sample(LABELS[:2]).shape == (2, 32, 48, 3)


@pytest.mark.slow
def test_a_mesh_draws_the_same_tokens(emoji):
    schedule = (1, 2, 3, (3, 4))
    sharded = var_jax.load("emoji", mesh=make_mesh(2, 2, 2), dtype="float32").at_schedule(schedule)
    wanted = emoji.at_schedule(schedule).sample_tokens(LABELS)
    np.testing.assert_array_equal(sharded.sample_tokens(LABELS), wanted)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ((2, 4), "must start at 1 and never fall"),
        ((1, 4, 2), "must start at 1 and never fall"),
        ((), "must start at 1 and never fall"),
        ((4,), "VAR begins with a scale of one token"),
    ],
)
def test_what_is_no_schedule(emoji, schedule, sentence):
    with pytest.raises(var_jax.BadInput, match=sentence):
        emoji.at_schedule(schedule)
