"""benchmarks/collapse.py: what its options are, whatever the configs say."""

import csv
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "collapse.py"


@pytest.fixture(scope="module")
def script():
    """What the benchmark defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
        return runpy.run_path(str(SCRIPT))


def test_codes_restart_alike_but_where_an_option_says_so(script):
    args = SimpleNamespace(steps=40, transformer_steps=2)
    for dataset in script["DATASETS"]:
        for option, fields in script["OPTIONS"].items():
            training = script["config_of"](args, dataset, option, 0).train_tokenizer
            restart = 0 if "codebook_restart=0" in fields else 0.03
            by_scale = option == "restart_by_scale"
            assert (training.codebook_restart, training.restart_by_scale) == (restart, by_scale)


def test_the_runs_that_are_kept_have_a_colour_each(script):
    with (SCRIPT.parent / "collapse" / "runs.csv").open() as file:
        assert {row["option"] for row in csv.DictReader(file)} <= set(script["DRAWN"])
