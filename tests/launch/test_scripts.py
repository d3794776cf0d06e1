"""Every launch script prints, with --dry_run, what it would do, and does nothing."""

import pathlib
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
INNER = ("common.sh", "host.sh")  # called by the others
SCRIPTS = sorted(p.name for p in LAUNCH.glob("*.sh") if p.name not in INNER)


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run(name, tmp_path):
    # No gcloud, xpk or sbatch in this PATH: whatever is run would fail.
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "NAME": "d16", "BUCKET": "gs://mine"}
    done = subprocess.run(
        [LAUNCH / name, "--dry_run"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("gcloud", "git", "xpk", "sbatch", "env")
    assert not list(tmp_path.iterdir())


def test_slices_are_asked_for_together(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "NAME": "d16", "SLICES": "2", "SPOT": "false"}
    script = [LAUNCH / "create.sh", "--dry_run"]
    out = subprocess.run(script, env=env, capture_output=True, text=True).stdout
    assert "--node-prefix d16 --node-count 2" in out and "--spot" not in out


def test_slurm_starts_one_process_a_node_with_all_gpus_and_their_cpus():
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "GPUS": "4", "CPUS_PER_GPU": "6"}
    script = [LAUNCH / "slurm.sh", "--dry_run"]
    out = subprocess.run(script, env=env, capture_output=True, text=True).stdout.replace("\\", "")
    assert "--ntasks-per-node 1 --gpus-per-node 4 --cpus-per-task 24 " in out
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 " in out
    assert "srun --cpus-per-task 24 python -m" in out


@pytest.mark.parametrize("name", ["host.sh", "xpk.sh"])
def test_hosts_get_what_evaluation_and_the_losses_of_the_tokenizer_need(name):
    assert "'.[tpu,gcs,report,features,lpips]'" in (LAUNCH / name).read_text()


@pytest.mark.parametrize("name", ["run.sh", "slurm.sh", "gpu.sh", "xpk.sh"])
def test_any_command_runs_with_its_flags_as_they_are(name):
    env = {"PATH": "/usr/bin:/bin", "PROJECT": "p", "WORKDIR": "gs://mine/samples"}
    flags = ["sample", "--checkpoint", "gs://mine/c", "--labels", "People & Body:2"]
    script = [LAUNCH / name, "--dry_run", *flags]
    out = subprocess.run(script, env=env, capture_output=True, text=True).stdout.replace("\\", "")
    assert "-m var_jax.sample --out gs://mine/samples" in out
    assert "--checkpoint gs://mine/c --labels People & Body:2" in out
    bad = [LAUNCH / name, "--dry_run", "paint"]
    assert subprocess.run(bad, env=env, capture_output=True).returncode == 2
