"""Hosts that write one folder of shards, each by itself: late, slow, failing or gone."""

import json
import threading

import pytest
from etils import epath

from var_jax import Failure
from var_jax.data import records
from var_jax.data.records import MANIFEST, UNFINISHED, Records, write_missing

pytest.importorskip("array_record")
ABOUT = {"kind": "a test"}


@pytest.fixture
def tmp_path(tmp_path):
    return epath.Path(tmp_path)


def write(folder, host, hosts, make=None):
    splits = [Records(str(folder), split, count, 4) for split, count in (("a", 21), ("b", 6))]

    def plain(split, rows, bar):
        bar.update(len(rows))
        return [f"{split}{row}".encode() for row in rows]

    write_missing(folder, ABOUT, splits, make or plain, "shards", host, hosts)
    return splits


def check_whole(folder):
    assert json.loads((folder / MANIFEST).read_text()) == ABOUT
    assert not (folder / UNFINISHED).exists() and not list(folder.glob(".*"))
    for split, count in (("a", 21), ("b", 6)):
        found = Records(str(folder), split, count, 4)
        assert [found[i] for i in range(count)] == [f"{split}{i}".encode() for i in range(count)]


def test_a_host_does_the_work_of_one_that_never_comes(tmp_path):
    write(tmp_path, 0, 3)
    check_whole(tmp_path)


def test_hosts_share_and_one_that_stands_still_delays_no_other(tmp_path):
    begun, go_on, made = threading.Event(), threading.Event(), {0: [], 1: []}

    def make(host):
        def records_of(split, rows, bar):
            made[host].append((split, rows.start // 4))
            if host:
                begun.set()
                go_on.wait(60)
            return [f"{split}{row}".encode() for row in rows]

        return records_of

    (tmp_path / UNFINISHED).write_text(json.dumps(ABOUT))
    slow = threading.Thread(target=write, args=(tmp_path, 1, 2, make(1)))
    slow.start()
    begun.wait(60)
    write(tmp_path, 0, 2, make(0))
    check_whole(tmp_path)
    assert made[0][:4] == [("a", 0), ("b", 0), ("a", 2), ("a", 4)]  # its own
    assert made[0][4:] == [("a", 5), ("a", 3), ("a", 1), ("b", 1)]  # then the other's, from the end
    go_on.set()
    slow.join()
    assert made[1] == [("a", 1)]
    check_whole(tmp_path)


def test_hosts_that_finish_together(tmp_path, monkeypatch):
    """One tidies up while the other is about to rename its manifest."""
    rename = type(tmp_path).replace

    def late(path, target):
        if target.name == MANIFEST:
            monkeypatch.undo()
            write(tmp_path, 1, 2)
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", late)
    (tmp_path / ".a.array_record.0.partial").touch()  # of a stopped command
    write(tmp_path, 0, 2)
    check_whole(tmp_path)


def test_a_host_that_fails_goes_on_where_it_was(tmp_path):
    def failing(split, rows, bar):
        if rows.start:
            raise OSError("the connection was reset")
        return [f"{split}{row}".encode() for row in rows]

    with pytest.raises(OSError, match="was reset"):
        write(tmp_path, 0, 2, failing)
    assert (tmp_path / UNFINISHED).exists()
    write(tmp_path, 1, 2)
    check_whole(tmp_path)
    write(tmp_path, 0, 2, failing)  # nothing is left to do


def test_a_host_that_waits_in_vain_for_the_first_fails(tmp_path, monkeypatch):
    """It is no refusal: host 0 may be slow to open its images, and the next time be there."""
    monkeypatch.setattr(records, "PATIENCE", 0.1)
    with pytest.raises(Failure, match="not one folder that all hosts share"):
        write(tmp_path / "mine", 1, 2)
    assert not (tmp_path / "mine").exists()
