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


def test_slurm_starts_one_process_a_node_with_all_gpus():
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "GPUS": "4"}
    script = [LAUNCH / "slurm.sh", "--dry_run"]
    out = subprocess.run(script, env=env, capture_output=True, text=True).stdout.replace("\\", "")
    assert "--ntasks-per-node 1 --gpus-per-node 4" in out
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3 srun" in out


FAKES = {
    "gcloud": """case "$*" in
  *queued-resources\\ ssh*) bash -c "${@: -1}" ;;
  *describe*) echo ACTIVE ;;
  storage\\ cp*) cat > ../refused.txt ;;
  storage\\ cat*) cat refused.txt ;;
  storage\\ ls*) exit 1 ;;
  *queued-resources\\ delete*) echo deleted ;;
esac""",
    "tmux": '[ "$1" = new-session ] && shift 4 && exec "$@"',
    "python": 'echo "error: no such field" >&2; exit 2',
    "sleep": "",
}


def test_watch_ends_with_a_run_that_is_refused(tmp_path):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    activate = tmp_path / "var_jax" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PROJECT": "p", "BUCKET": "gs://mine"}
    done = subprocess.run(
        [LAUNCH / "watch.sh"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("error: no such field\n") and "deleted" in done.stdout
