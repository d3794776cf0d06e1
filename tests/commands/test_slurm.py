"""Two nodes of a Slurm job, as jax detects them: `--distributed` alone tells who they are."""

import os
import signal

import numpy as np
import pytest
from running import run, start, wait_for

from var_jax.tools.npz import load_npz


@pytest.fixture
def nodes(monkeypatch):
    """Starts a command on two nodes, whose flags may differ."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}

    def begin(name, *flags, out):
        running = []
        for i in range(2):
            for variable, value in (job | {"SLURM_PROCID": str(i)}).items():
                monkeypatch.setenv(variable, value)
            place = ("--distributed", "--out", out[i])
            running.append(start(name, *flags, *place, devices=2, patient=False))
        return running

    return begin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"), [("sample", ("--num", 4)), ("encode", ("--images", "emoji"))]
)
def test_a_folder_that_is_not_shared_is_refused_at_the_start(
    name, flags, nodes, untrained, tmp_path
):
    out = [tmp_path / "first", tmp_path / "second"]
    for process in nodes(name, "--checkpoint", untrained, *flags, out=out):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2, err
        assert err.splitlines()[-1].startswith("error: --out=") and "is not shared by all" in err
    assert not any(path.exists() for path in out)


@pytest.mark.slow
def test_a_node_that_is_stopped_leaves_its_work_to_the_other(nodes, untrained, tmp_path):
    out = tmp_path / "tokens"
    flags = ("--checkpoint", untrained, "--images", "emoji", "--copies", 8, "--batch_size", 16)
    first, second = nodes("encode", *flags, out=[out, out])
    wait_for(out / "unfinished.json")
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 130
    said, err = first.communicate(timeout=300)
    assert first.returncode == 0 and "codes of 13890 crops" in said, err
    assert (out / "manifest.json").exists() and not (out / "unfinished.json").exists()


@pytest.mark.slow
def test_nodes_reject_as_one_does(nodes, other, tmp_path):
    flags = ("--checkpoint", other, "--labels", "d:5,a:2", "--reject", 0.5, "--batch_size", 4)
    over_both = ("--fsdp", 4)  # so that no node has all weights
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    code, _, err = run("sample", *flags, "--out", alone)
    assert code == 0, err
    for process in nodes("sample", *flags, *over_both, out=[shared, shared]):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    ours, theirs = (load_npz(folder / "samples.npz") for folder in (shared, alone))
    assert ours["labels"].tolist() == [3] * 5 + [0] * 2
    np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
