"""Samples on disk: parts named by their rows, whoever wrote them, in whatever batches."""

import json
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from var_jax import BadInput, Failure
from var_jax.sampling import to_disk
from var_jax.sampling.to_disk import Job, runs
from var_jax.tools.npz import load_npz, save_npz

LABELS = np.arange(23, dtype=np.int32) % 5


@pytest.fixture
def tmp_path(tmp_path):
    return epath.Path(tmp_path)


def paint(weights, labels, keys, known):
    """An image that tells which key it is of."""
    tokens = (jax.random.key_data(keys)[:, :1] >> 1).astype(jnp.int32)
    images = jnp.broadcast_to(tokens[:, None, None] % 251, (len(tokens), 2, 2, 3))
    return images.astype(jnp.uint8), tokens


def job(out, batch_size=4):
    begun = Job(paint, None, LABELS, out, batch_size)
    begun.begin({"weights": "w"})
    return begun


def finished(out, **how):
    """The arrays of a job that runs to its end."""
    last = job(out, **how)
    last.sample(np.arange(len(LABELS), dtype=np.int32))
    path = last.finish()
    assert not last.parts.exists()
    return load_npz(path)


def check_equal(found, wanted):
    assert list(found) == ["arr_0", "labels", "tokens"]
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture
def wanted(tmp_path):
    whole = finished(tmp_path / "whole")
    np.testing.assert_array_equal(whole["labels"], LABELS)
    assert len(np.unique(whole["tokens"])) == len(LABELS)
    return whole


class Stop(Exception):
    pass


@pytest.mark.parametrize("batch_size", [3, 4, 5, 64])
def test_a_stopped_job_goes_on_in_other_batches(tmp_path, wanted, batch_size, monkeypatch):
    save, saved = to_disk.save_npz, []

    def stopping(path, **arrays):
        if len(saved) == 3:
            raise Stop
        saved.append(path.name)
        save(path, **arrays)

    monkeypatch.setattr(to_disk, "save_npz", stopping)
    with pytest.raises(Stop):
        finished(tmp_path / "out", batch_size=4)
    monkeypatch.undo()
    assert saved[-1] == "00000008-00000012.npz"
    (tmp_path / "out" / "parts" / saved[1]).unlink()
    cut = tmp_path / "out" / "parts" / saved[0]
    cut.write_bytes(cut.read_bytes()[:-9])
    check_equal(finished(tmp_path / "out", batch_size=batch_size), wanted)


def test_each_host_writes_the_rows_it_has(tmp_path, wanted, monkeypatch):
    """Of two hosts the second one is gone after two batches; one host does the rest."""
    generate, batches = to_disk.generate, []

    def of_host(host, *args, **kwargs):
        for batch in generate(*args, **kwargs):
            batches.append(batch)
            mine = np.arange(len(batch.rows)) % 4 // 2 == host  # rows 0 1 or 2 3 of each four
            if host == 0 or len(batches) < 3:
                yield batch._replace(**{n: getattr(batch, n)[mine] for n in batch._fields})

    monkeypatch.setattr(to_disk, "PATIENCE", 0)
    for host in (0, 1):
        batches.clear()
        monkeypatch.setattr(to_disk, "generate", lambda *a, h=host, **k: of_host(h, *a, **k))
        begun = job(tmp_path / "out", batch_size=8)
        if host == 0:
            begun.sample(np.arange(len(LABELS), dtype=np.int32))
            with pytest.raises(Failure, match="holds no image 2, which"):
                begun.finish()
        else:  # it starts with the first, and does not see what that has written
            monkeypatch.setattr(Job, "missing", lambda self, prefix, n: np.ones(n, np.int32))
            begun.sample(np.arange(len(LABELS), dtype=np.int32))
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "out" / "parts").glob("*.npz"))
    assert names[:3] == ["00000000-00000002.npz", "00000002-00000004.npz", "00000004-00000006.npz"]
    check_equal(finished(tmp_path / "out", batch_size=8), wanted)


def test_parts_of_older_versions_are_taken(tmp_path, wanted):
    parts = tmp_path / "out" / "parts"
    parts.mkdir(parents=True)
    (parts / "settings.json").write_text(json.dumps({"weights": "w", "batch_size": 10}))
    other = {name: array[10:20].copy() for name, array in wanted.items()}
    other["arr_0"] += 1
    save_npz(parts / "00000010.npz", **other)
    found = finished(tmp_path / "out")
    np.testing.assert_array_equal(found["arr_0"][10:20], other["arr_0"])
    np.testing.assert_array_equal(found["arr_0"][20:], wanted["arr_0"][20:])


def test_a_kill_before_the_parts_are_gone_loses_nothing(tmp_path, monkeypatch):
    begun = Job(paint, None, LABELS, tmp_path, 4)
    monkeypatch.setattr(Job, "remove_parts", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begun.once({"weights": "w"})
    monkeypatch.undo()
    monkeypatch.setattr(Job, "sample", Mock(side_effect=AssertionError))
    assert begun.once({"weights": "w"}) == tmp_path / "samples.npz"
    assert not begun.parts.exists()


def test_samples_of_another_schedule_are_refused(tmp_path):
    flags = {"weights": "w", "patch_nums": "(1, 2)"}
    path = job(tmp_path).once(flags)
    assert job(tmp_path).once(flags) == path
    with pytest.raises(BadInput, match=r"--patch_nums=\(1, 2\), not None"):
        job(tmp_path).once(flags | {"patch_nums": None})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "photo.png").touch()
    with pytest.raises(BadInput, match="was not made by this command"):
        job(tmp_path)


def test_runs():
    rows = np.array([4, 5, 6, 9, 10, 12])
    found = runs(rows, np.array([True, True, False, True, True, True]))
    assert [rows[run].tolist() for run in found] == [[4, 5], [9, 10], [12]]
    assert runs(rows, np.zeros(6, bool)) == []
