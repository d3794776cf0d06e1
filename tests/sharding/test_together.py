"""A host hears the others, and ends when it would be deaf."""

import threading

import jax
import pytest
from jax._src import distributed

from var_jax.sharding import hosts
from var_jax.tools import ending


class Store:
    """A key-value store, as process 0 has it, whose first `failing` answers get lost."""

    def __init__(self, failing, **values):
        self.left = failing
        self.values = {f"var_jax/{key}": value for key, value in values.items()}

    def key_value_set(self, key, value):
        self.values.setdefault(key, value)

    def key_value_try_get(self, key):
        if key.startswith("var_jax/point") and self.left:
            self.left -= 1
            raise RuntimeError("UNAVAILABLE")
        if key not in self.values:
            raise RuntimeError("NOT_FOUND")
        return self.values[key]


class Left(BaseException):
    pass


def listen(monkeypatch, store, unsaved=True):
    """How listening ends: exit code and sentence, or the point to stop at."""
    process = ending.Process(unsaved=unsaved, points=7)

    def exit_at_once(code, sentence):
        process.log = code, sentence
        raise Left

    monkeypatch.setattr(ending, "process", process)
    monkeypatch.setattr(ending, "exit_at_once", exit_at_once)
    monkeypatch.setattr(hosts, "PERIOD", 0.01)
    monkeypatch.setattr(hosts, "STOPPING", 0.2)
    left = threading.Event()
    monkeypatch.setattr(hosts, "_left", left)
    jax.devices()  # ahead of a client that these would use
    monkeypatch.setattr(distributed.global_state, "client", store)
    threading.Timer(1.0, left.set).start()
    try:
        hosts._Together().listen()
    except Left:
        return process.log
    return process.stop_at


@pytest.mark.parametrize(
    "store, ends",
    [
        (Store(0, stop="1"), 8),
        (Store(3, stop="1"), 8),
        (Store(10**9, stop="1"), (1, f"error: {ending.LOST}")),
        (Store(0, stop="1", **{"point/0": "-1"}), (130, "interrupted")),
        (Store(0, end='[2, "refused"]'), (2, "refused")),
        (Store(0, end="{"), 1),
    ],
)
def test_how_listening_ends(monkeypatch, store, ends):
    found = listen(monkeypatch, store)
    assert found == ends or (isinstance(found, tuple) and found[0] == ends)


def test_a_marker_that_a_kill_left_is_removed(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        (tmp_path / ".shared-04d315e302e1e804").touch()
        hosts.check_shared("--out", folder)
        assert any(tmp_path.iterdir()) == (folder != tmp_path)
