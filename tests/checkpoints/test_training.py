"""Checkpoints survive kills, damage, other meshes and full disks, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from var_jax import BadInput
from var_jax.checkpoints.training import Checkpoints

ROOT = Path(__file__).parents[2]


def _mesh(data, fsdp):
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), devices=jax.devices()[: data * fsdp])


def _state(seed, mesh=None):
    mesh = mesh or _mesh(4, 2)
    kernel, bias = jax.random.split(jax.random.key(seed))
    return {
        "model": nnx.Linear(64, 128, param_dtype=jnp.float32, rngs=nnx.Rngs(seed)),
        "ema": jax.device_put(
            jax.random.normal(kernel, (64, 128), jnp.bfloat16),
            NamedSharding(mesh, PartitionSpec("data", "fsdp")),
        ),
        "moments": (jax.random.normal(bias, (300, 7)), jnp.full((3,), jnp.nan)),
        "step": jnp.int32(seed),
    }


def _abstract(state, mesh=None):
    def leaf(x):
        sharding = x.sharding
        if mesh is not None:
            spec = PartitionSpec("fsdp") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def _assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _saved(directory, *steps):
    run = Checkpoints(directory)
    for step in steps:
        run.save(step, _state(step), {"next": step})
    run.close()


def test_restores_bit_for_bit_on_another_mesh(tmp_path):
    run = Checkpoints(tmp_path / "run")
    assert run.restore(_abstract(_state(0))) is None
    run.save(7, _state(7), {"position": [7, "é"]}, wait=True)
    run.close()

    mesh = _mesh(1, 8)
    again = Checkpoints(tmp_path / "run")
    step, state, data = again.restore(_abstract(_state(0), mesh))
    assert (step, data) == (7, {"position": [7, "é"]})
    _assert_same(state, _state(7))
    assert isinstance(state["model"], nnx.Linear)
    assert state["ema"].sharding == NamedSharding(mesh, PartitionSpec("fsdp"))
    again.close()


def test_keeps_the_newest_and_leaves_a_saved_step_alone(tmp_path):
    run = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        run.save(step, _state(step), {"next": step})
    run.save(3, _state(99), {"next": 99})
    step, state, data = run.restore(_abstract(_state(0)))
    assert (step, data) == (3, {"next": 3})
    _assert_same(state, _state(3))
    run.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_all_processes_restore_the_step_that_the_first_one_sees(tmp_path, monkeypatch):
    """A network file system may show a process an older list of the folder than the first one."""
    _saved(tmp_path, 1)
    other = Checkpoints(tmp_path)  # which lists step 1 alone
    _saved(tmp_path, 2)
    newest = lambda make, shape, dtype: np.array(2, dtype)
    monkeypatch.setattr("var_jax.checkpoints.training.of_first", newest)
    step, state, _ = other.restore(_abstract(_state(0)))
    assert step == 2
    _assert_same(state, _state(2))
    other.close()


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    _saved(tmp_path, 1)
    run = Checkpoints(tmp_path)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    monkeypatch.setattr(run._orbax, "load_checkpointables", Mock(side_effect=full))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        run.restore(_abstract(_state(0)))
    run.close()
    assert (tmp_path / "1").exists()


def test_closing_asks_no_other_process(tmp_path, monkeypatch):
    """The others may be amid a step, when an exception of this one unwinds."""
    run = Checkpoints(tmp_path)
    run.save(1, _state(1), {"next": 1})
    monkeypatch.setattr("var_jax.checkpoints.training.multihost_utils", None)
    run.close()
    assert (tmp_path / "1").exists()


def test_training_may_donate_what_is_being_saved(tmp_path):
    run = Checkpoints(tmp_path)
    state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
    before = np.array(state["w"])
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    run.save(1, state, {})
    for _ in range(3):
        state = step(state)
    _, got, _ = run.restore(_abstract(state))
    np.testing.assert_array_equal(got["w"], before)
    run.close()


def _largest(folder, pattern):
    return max(folder.rglob(pattern), key=lambda p: p.stat().st_size)


def _damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        os.truncate(path, len(content) // 2)


@pytest.mark.parametrize("how", ["deleted", "cut"])
@pytest.mark.parametrize("what", ["d/*", "*"])  # test_tampering.py has every file
def test_damage_falls_back_to_the_checkpoint_before(tmp_path, capsys, what, how):
    _saved(tmp_path, 1, 2)
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
    for path in files if what == "*" else [_largest(tmp_path / "2", what)]:
        _damage(path, how)

    run = Checkpoints(tmp_path)
    capsys.readouterr()
    step, state, data = run.restore(_abstract(_state(0)))
    assert (step, data) == (1, {"next": 1})
    _assert_same(state, _state(1))
    err = capsys.readouterr().err
    if what != "*":
        assert err.count("\n") == 1 and f"{tmp_path / '2'} cannot be read" in err

    run.save(2, _state(2), {"next": 2}, wait=True)
    step, state, _ = run.restore(_abstract(_state(0)))
    assert step == 2
    _assert_same(state, _state(2))
    run.close()
    assert (tmp_path / "damaged-2").exists()


def test_damage_is_found_without_the_record_of_sizes_too(tmp_path):
    _saved(tmp_path, 1, 2)
    (tmp_path / "2" / "files.json").unlink()
    path = _largest(tmp_path / "2", "d/*")
    os.truncate(path, path.stat().st_size // 2)
    run = Checkpoints(tmp_path)
    assert run.restore(_abstract(_state(0)))[0] == 1
    run.close()


def test_nothing_readable_is_an_error_and_stays_one(tmp_path):
    _saved(tmp_path, 1)
    _largest(tmp_path / "1", "d/*").unlink()
    for _ in range(2):
        run = Checkpoints(tmp_path)
        with pytest.raises(BadInput, match=r"no checkpoint in .* can be read"):
            run.restore(_abstract(_state(0)))
        run.close()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s | {"ema": jnp.zeros((64, 64), jnp.bfloat16)}, r"'ema' with shape \(64, 128\)"),
        (lambda s: s | {"extra": jnp.zeros(3)}, "no tensor 'extra'"),
        (lambda s: {k: v for k, v in s.items() if k != "moments"}, "a tensor 'moments/0'"),
        (lambda s: s | {"ema": s["ema"].astype(jnp.float32)}, "'ema' as bfloat16; .* float32"),
    ],
)
def test_another_config_is_no_damage(tmp_path, change, sentence):
    _saved(tmp_path, 1)
    run = Checkpoints(tmp_path)
    with pytest.raises(BadInput, match=sentence):
        run.restore(_abstract(change(_state(0))))
    assert run.restore(_abstract(_state(0)))[0] == 1
    run.close()


KILLED = """
import sys
import jax
from var_jax.checkpoints.training import Checkpoints

run = Checkpoints(sys.argv[1])
state = {"w": jax.random.normal(jax.random.key(0), (3000, 3000))}
run.save(1, state, {"next": 1}, wait=True)
for step in range(2, 1000):
    print(step, flush=True)
    run.save(step, state, {"next": step})
"""


@pytest.mark.parametrize("delay", [0.02, 0.1])
def test_a_kill_while_saving_leaves_the_earlier_one(tmp_path, delay):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    run = Checkpoints(tmp_path)
    step, state, data = run.restore({"w": jax.ShapeDtypeStruct((3000, 3000), jnp.float32)})
    assert step >= 1 and data == {"next": step}
    np.testing.assert_array_equal(state["w"], jax.random.normal(jax.random.key(0), (3000, 3000)))
    run.close()
    assert all(p.name.isdigit() for p in tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_an_error_and_leaves_the_earlier_one(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        run = Checkpoints(tmp_path)
        small = {"w": jax.random.normal(jax.random.key(0), (500, 500))}
        run.save(1, small, {}, wait=True)
        run.save(2, {"w": jax.random.normal(jax.random.key(1), (3000, 3000))}, {})
        with pytest.raises(Exception, match="No space left on device"):
            run.wait()
        again = Checkpoints(tmp_path)
        step, state, _ = again.restore(_abstract(small))
        assert step == 1
        _assert_same(state, small)
        again.close()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


NAMES = (
    "lr[1e-3]",
    "[!a]",
    "a*b",
    "**",
    "a?b",
    "a%20b",
    "a#b",
    "a@b",
    "a:b",
    "a b",
    "a\nb",
    "é漢😀",
)
NAMES += ("-x", "{a,b}", "$HOME", "'\"", "x" * 240, "100", "tail~", "a.npz", "t.orbax-x")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, folder in enumerate((tmp_path / name, Path(name) / ".." / name)):
        run = Checkpoints(folder)
        run.save(i, {"w": jnp.arange(6.0)}, {"next": 1}, wait=True)
        run.close()
        again = Checkpoints(folder)
        step, state, _ = again.restore({"w": jax.ShapeDtypeStruct((6,), jnp.float32)})
        again.close()
        np.testing.assert_array_equal(state["w"], np.arange(6.0))
        assert step == i


def test_a_folder_that_tensorstore_reads_as_another(tmp_path):
    for folder in (tmp_path / "a\\b", tmp_path / "a\\b" / "c"):
        with pytest.raises(BadInput, match="backslash"):
            Checkpoints(folder)
    assert not list(tmp_path.iterdir())
