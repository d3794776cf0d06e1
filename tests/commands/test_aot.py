"""The report on a step compiled for TPUs that are not there."""

import json

import pytest
from running import complaint, run_alone

from var_jax.config import Config
from var_jax.training.aot import model_flops

SMALL = (
    "--config", "imagenet:d16", "--config.transformer.depth=2",
    "--config.transformer.width=128", "--config.transformer.num_heads=2", "--topology", "v5e:2x2",
    "--config.train_transformer.batch_size=256", "--json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--topology", "v5e:2x2"], "--config is missing"),
        ([*SMALL[:2]], "--topology is missing"),
        ([*SMALL[:2], "--topology", "v9:2x2"], "'v9:2x2' is not of v5e, v5p, v6e"),
    ],
)
def test_bad_input(flags, sentence):
    assert sentence in complaint("aot", *flags)


def test_a_step_on_pixels_counts_every_operation_of_the_encoder():
    pixels, tokens = (model_flops(Config(), program) for program in ("pixels", "transformer"))
    # Three quarters are (4 + 5/4) * 2 * 9 * 160**2 * 256**2: the 3x3 convolutions of the two finest
    # levels.
    assert (pixels - tokens) / 1e9 == pytest.approx(215.36, rel=1e-4)


@pytest.mark.slow
@pytest.mark.tpu
def test_report():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install -e '.[tpu]'")
    code, out, err = run_alone("aot", *SMALL)
    assert code == 0, err
    report = json.loads(out)
    assert report["chips"] == 4 and report["fits"]
    assert 0 < report["efficiency"] < 1
    assert report["kernel_cycles_charged"] > 0
    assert report["bytes_per_chip"] > report["bytes_activations"] > 0
    assert report["collective_bytes_by_kind"]["all-gather"] > 0
    gradients = report["collective_bytes_fsdp"] / 3  # two bytes of each
    assert report["collective_bytes_by_kind"]["reduce-scatter"] > gradients
    total = report["estimated_cycles"] + report["kernel_cycles_charged"]
    assert report["efficiency"] == pytest.approx(report["yardstick_cycles"] / total, rel=1e-3)
    code, out, _ = run_alone(
        "aot", *SMALL[:-2], "--config.train_transformer.batch_size=40000", "--json"
    )
    assert code == 0 and not json.loads(out)["fits"]
