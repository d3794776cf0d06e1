"""Hosts that read a source together read each item once, and all get all of them in order."""

import jax
import numpy as np
import pytest

from var_jax.evaluation import reading


class Numbers:
    """Item i holds three times i."""

    class_names = ("number",)

    def __init__(self, count: int):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(int(index))
        return {"image": np.full(3, index, np.uint8), "label": np.int32(index)}

    def train_item(self, index, epoch, rng):
        return self[index]


@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("rows", [None, np.arange(36, 0, -2)])
def test_each_host_reads_its_share(monkeypatch, hosts, rows):
    sources, found = [Numbers(37) for _ in range(hosts)], []
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    for host, source in enumerate(sources):
        shares = []
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        monkeypatch.setattr(
            reading, "process_allgather", lambda own, tiled, into=shares: into.append(own) or own
        )
        batches = [*reading.in_order(source, 16, rows)]
        found.append(shares or batches)
    wanted = np.arange(37) if rows is None else rows
    for k, start in enumerate(range(0, len(wanted), 16)):
        part = wanted[start : start + 16]
        for name in ("image", "label"):
            values = np.concatenate([each[k][name] for each in found])[: len(part)]
            np.testing.assert_array_equal(values.reshape(len(part), -1)[:, 0], part)
    read = [i for source in sources for i in source.read]
    assert {*read} == {*wanted.tolist()} and len(read) <= len(wanted) + 2 * hosts
    assert max(len(source.read) for source in sources) <= -(-len(wanted) // hosts) + 2
