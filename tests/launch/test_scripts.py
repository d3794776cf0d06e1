"""Every launch script prints, with --dry_run, what it would do, and does nothing."""

import pathlib
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(p.name for p in LAUNCH.glob("*.sh") if p.name != "common.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run(name, tmp_path):
    # No gcloud, xpk or sbatch in this PATH: whatever is run would fail.
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "NAME": "d16", "BUCKET": "gs://mine"}
    done = subprocess.run(
        [LAUNCH / name, "--dry_run"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("gcloud", "xpk", "sbatch", "bash", "env")
    assert not list(tmp_path.iterdir())
    assert len((LAUNCH / name).read_text().splitlines()) < 60


def test_slices_are_asked_for_together(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "NAME": "d16", "SLICES": "2", "SPOT": "false"}
    script = [LAUNCH / "create.sh", "--dry_run"]
    out = subprocess.run(script, env=env, capture_output=True, text=True).stdout
    assert "--node-prefix d16 --node-count 2" in out and "--spot" not in out
