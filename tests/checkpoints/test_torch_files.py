"""PyTorch's files without PyTorch: what it writes is read, what would do harm is refused.

The pickles here come from Python's own pickler and stand-ins for torch's classes, not from our
writer, so that the two do not share an error.
"""

import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import BadInput
from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.checkpoints.torch.pth import write_pth
from var_jax.checkpoints.torch.safetensors import write_safetensors


class Storage(NamedTuple):
    key: str
    count: int
    kind: str = "FloatStorage"


class Tensor:
    """Pickles as a torch tensor does: a view of a storage."""

    def __init__(self, storage, shape, strides, offset=0):
        self.about = (storage, offset, shape, strides, False, OrderedDict())


class Call:
    """Pickles as a call, as any class may."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def torch_pickle(monkeypatch):
    """`pickle.dumps` in the way of torch.save."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        pass

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = (
        "torch._utils",
        "_rebuild_tensor_v2",
    )
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Pickler(pickle.Pickler):
        extra = ()  # of a persistent id

        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                kind = getattr(torch, obj.kind)
                return ("storage", kind, obj.key, "cpu", obj.count, *self.extra)

        def reducer_override(self, obj):
            return (_rebuild_tensor_v2, obj.about) if isinstance(obj, Tensor) else NotImplemented

    def dumps(obj, protocol=2, extra=()):
        data = io.BytesIO()
        pickler = Pickler(data, protocol)
        pickler.extra = extra
        pickler.dump(obj)
        return data.getvalue()

    return dumps


def archive(path, pickled, *storages, compress=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("model/data.pkl", pickled)
        file.writestr("model/byteorder", order)
        for key, storage in enumerate(storages):
            file.writestr(f"model/data/{key}", np.asarray(storage).tobytes())
        file.writestr("model/version", "3\n")
    return path


def legacy(pickled, *storages, keys="01", little_endian=True, number=0x1950A86A20F9469CFC6C):
    """What PyTorch before 1.6 writes."""
    facts = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    head = [pickle.dumps(part, 2) for part in (number, 1001, facts)]
    values = [struct.pack("<q", s.size) + s.tobytes() for s in map(np.asarray, storages)]
    return b"".join([*head, pickled, pickle.dumps(list(keys[: len(storages)]), 2), *values])


def read(path, mark=""):
    return {name: np.asarray(tensor) for name, tensor in open_tensors(path, mark).items()}


@pytest.mark.parametrize("protocol", [2, 4])
def test_views_of_storages_are_read(torch_pickle, tmp_path, protocol):
    values, half = np.arange(24, dtype=np.float32), np.arange(4, dtype=np.float16)
    state = OrderedDict(
        whole=Tensor(Storage("0", 24), (4, 6), (6, 1)),
        part=Tensor(Storage("0", 24), (2, 3), (6, 1), 8),
        transposed=Tensor(Storage("0", 24), (6, 4), (1, 6)),
        half=Tensor(Storage("1", 4, "HalfStorage"), (4,), (1,)),
        number=Tensor(Storage("0", 24), (), (), 5),
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    path = archive(tmp_path / "t.pth", torch_pickle(state, protocol), values, half)
    tensors = read(path)
    grid = values.reshape(4, 6)
    np.testing.assert_array_equal(tensors["whole"], grid)
    np.testing.assert_array_equal(tensors["part"], grid[1:3, 2:5])
    np.testing.assert_array_equal(tensors["transposed"], grid.T)
    np.testing.assert_array_equal(tensors["half"], half)
    assert tensors["half"].dtype == np.float16 and tensors["number"] == 5


def test_legacy_files_are_read(torch_pickle, tmp_path):
    values, half = np.arange(24, dtype=np.float32), np.arange(4, dtype=np.float16)
    state = OrderedDict(
        part=Tensor(Storage("0", 24), (3, 2), (1, 6), 8),
        half=Tensor(Storage("1", 4, "HalfStorage"), (4,), (1,)),
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    path = tmp_path / "t.pth"
    path.write_bytes(legacy(torch_pickle(state, extra=(None,)), values, half))
    tensors = read(path)
    np.testing.assert_array_equal(tensors["part"], values.reshape(4, 6)[1:3, 2:5].T)
    np.testing.assert_array_equal(tensors["half"], half)


def test_legacy_files_of_python_2_are_read(tmp_path):
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x06cuda:0K\x02NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89NtR"
    pickled = b"\x80\x02ccollections\nOrderedDict\n]](U\x01w" + tensor + b"ea\x85R."
    path = tmp_path / "t.pth"
    path.write_bytes(legacy(pickled, np.float32([1, 2])))
    np.testing.assert_array_equal(read(path)["w"], [1, 2])


def test_damaged_legacy_files(torch_pickle, tmp_path):
    path, values = tmp_path / "t.pth", np.arange(4, dtype=np.float32)
    state = {"w": Tensor(Storage("0", 4), (4,), (1,))}
    pickled = torch_pickle(state, extra=(None,))
    view = torch_pickle(state, extra=(("1", 0, 2),))
    call = pickle.dumps({"w": Call(exec, "raise SystemExit('it ran')")}, 2)
    for content, sentence in (
        (legacy(pickled, values)[:-1], "does not hold the 4 values of '0'"),
        (legacy(pickled, values[:3]), "does not hold the 4 values of '0'"),
        (legacy(pickled, values, keys="1"), "cannot be read"),
        (legacy(pickled), "storage '0' is missing"),
        (legacy(pickled, values)[:200], "cannot be read"),
        (legacy(pickled, values, little_endian=False), "big-endian"),
        (legacy(view, values), "a persistent object"),
        (legacy(call, values), "holds more than weights"),
        (legacy(torch_pickle({"w": Tensor(Storage("0", 4), (5,), (1,))}, extra=(None,)), values),
         "reaches beyond its 16 bytes"),
    ):  # fmt: skip
        path.write_bytes(content)
        refused(path, sentence)


def test_a_state_dict_inside_a_training_checkpoint(torch_pickle, tmp_path):
    weights = OrderedDict(w=Tensor(Storage("0", 3), (3,), (1,)))
    args = {"depth": 16, "name": "a", "lr": 1e-4, "big": 1 << 40, "none": None, "shape": (1, [2])}
    state = {"args": args, "trainer": {"vae": weights, "groups": [{"params": [0, 1]}]}}
    path = archive(tmp_path / "t.pth", torch_pickle(state), np.float32([1, 2, 3]))
    for name in (path, f"{path}:trainer.vae"):
        np.testing.assert_array_equal(read(name)["w"], [1, 2, 3])
    with pytest.raises(
        BadInput, match=r"not 'trainer': expected one of 'trainer.vae', as in .*:tra"
    ):
        open_tensors(f"{path}:trainer")


class Namespace:
    """Pickles as argparse's and other plain objects do, by NEWOBJ and BUILD."""

    def __init__(self):
        self.lr, self.path, self.sizes = 0.1, pathlib.PurePosixPath("a"), {1, (2,)}


def weights(*names):
    return OrderedDict((name, Tensor(Storage("0", 3), (3,), (1,))) for name in names)


BESIDE = {
    "args": Namespace(), "epoch": 3, "loss": [np.float64(2.5)], "kinds": {"a", ("b",)}, None: b"x",
    "optimizer": {"state": {0: {"step": Tensor(Storage("0", 3), (), ()), "betas": (0.9, 0.95)}}},
}  # fmt: skip
A_W, TWO = ["a", "w"], "2 state dicts: expected one of 'model', 'ema', as in .*:model"


@pytest.mark.parametrize(
    "state, key, expected",
    [
        (weights("a", "w"), "", A_W),
        (weights("module.a", "module.w"), "", A_W),
        (weights("_orig_mod.a", "_orig_mod.w"), "", A_W),
        (weights("module._orig_mod.a", "_orig_mod.module.w"), "", A_W),
        (weights("model.a", "model.module.w", "loss.b"), "", A_W),
        ({"model": weights("a", "w")}, "", A_W),
        ({"state_dict": weights("module.a", "module.w"), **BESIDE}, "", A_W),
        ({"state": {"net": {"model": weights("a", "w")}, "disc": weights("b")}}, "", A_W),
        ({"model": weights("a", "w"), "ema": weights("w"), **BESIDE}, "ema", ["w"]),
        ({"model": weights("a", "w"), "ema": weights("w"), **BESIDE}, "", TWO),
        ({"model": weights("a", "w"), "ema": weights("w")}, "sgd", "not 'sgd': expected one of 'm"),
        (weights("net.w", "ema.w"), "", "expected one of 'net', 'ema'"),
        (weights("w", "module.w"), "", "holds 'module.w' and 'w'; expected one of the two"),
        (weights("_orig_mod.w", "module.w"), "", "holds 'module.w' and '_orig_mod.w'; expected"),
        (BESIDE | {"optimizer": Namespace()}, "", "but 'args' of type Namespace, 'epoch' of type"),
        (Namespace(), "", "but an object of type Namespace; expected a state dict"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_state_dict_that_is_meant(torch_pickle, tmp_path, state, key, expected, protocol):
    values = np.float32([1, 2, 3])
    path = archive(tmp_path / "t.pth", torch_pickle(state, protocol), values)
    path = f"{path}:{key}" if key else path
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=expected):
            open_tensors(path, "w")
        return
    found = read(path, "w")
    assert sorted(found) == expected
    np.testing.assert_array_equal(found["w"], values)


def test_a_file_whose_name_has_a_colon_and_safetensors_with_prefixes(tmp_path):
    path = tmp_path / "a:model"
    write_safetensors(path, {f"{net}.module.w": np.float32([i]) for i, net in enumerate("xy")})
    assert read(f"{path}:y", "w") == {"w": 1}
    with pytest.raises(BadInput, match=r"expected one of 'x', 'y', as in .*a:model:x"):
        read(path, "w")


def test_what_a_pickle_holds_may_hold_itself(torch_pickle, tmp_path):
    state = {"model": weights("w"), "list": []}
    state["self"] = state["model"]["self"] = state
    state["list"].append(state)
    path = archive(tmp_path / "t.pth", torch_pickle(state), np.float32([1, 2, 3]))
    assert list(read(path, "w")) == ["w"]


@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_what_is_written_is_read(tmp_path, write):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((3, 4), np.float32).T,
        "b": np.arange(5),
        "c": rng.standard_normal(3).astype(np.float16),
        "d": rng.standard_normal(7).astype(jnp.bfloat16),
        "e": np.float32(2).reshape(()),
        "f": np.zeros((0, 2), np.float32),
        "g": np.array([True, False]),
    }
    path = tmp_path / "weights"
    write(path, tensors)
    found = read(path)
    assert sorted(found) == sorted(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def refused(path, sentence):
    with pytest.raises(BadInput, match=sentence) as raised:
        read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404", "is a web page"),
        (b"\n<html>Not Found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "is damaged or cut short"),
        (b"PK\x03\x04" + bytes(100), "its table of contents cannot be read"),
        (b"just text", "no file of weights"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header too large"),
        (struct.pack("<Q", 5) + b"{]]]]", "invalid JSON in header"),
    ],
)
def test_other_files(tmp_path, content, sentence):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refused(path, sentence)


def test_no_file(tmp_path):
    refused(tmp_path / "no.pth", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


def of_kind(kind, rebuild="_rebuild_tensor_v2", more=""):
    """The pickle of one tensor that torch would make of a storage of this kind."""
    storage = f"(X\x07\0\0\0storagectorch\n{kind}\nX\1\0\0\x000X\3\0\0\0cpuK\x08tQ"
    text = f"\x80\2}}X\1\0\0\0wctorch._utils\n{rebuild}\n({storage}K\0K\2\x85K\1\x85\x89N{more}tRs."
    return text.encode("latin-1")


@pytest.mark.parametrize(
    ("pickled", "kind"),
    [
        (of_kind("ComplexFloatStorage"), "ComplexFloat"),
        (of_kind("QInt8Storage", "_rebuild_qtensor"), "QInt8"),
        (of_kind("UntypedStorage", "_rebuild_tensor_v3", "ctorch\nfloat8_e5m2\n"), "float8_e5m2"),
        (of_kind("UntypedStorage", "_rebuild_tensor_v3", "ctorch\nuint16\n"), "uint16"),
    ],
)
def test_other_types_are_named(tmp_path, pickled, kind):
    path = archive(tmp_path / "t.pth", pickled, np.zeros(8, np.uint8))
    refused(path, f"holds a tensor of type '{kind}', which is not read; expected real floats")


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps({"w": Call(exec, "raise SystemExit('it ran')")}, 2),
        pickle.dumps({"w": Call(exec, "raise SystemExit('it ran')")}, 4),
        b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.",
        b"(S'id'\nios\nsystem\n.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}\x85R.",
        pickle.dumps({((1,),): 2}, 2),
        b"\x80\x02}r\xff\xff\xff\xff.",  # memo index 2³²-1, 64 GB in Python's own unpickler
        b"\x80\x02" + b"]" * 10 + b"a" * 20 + b".",
        b"\x80\x02}(X\x01\x00\x00\x00au.",
        b"\x80\x02h\x05.",
        b"\x80\x02ccollections\nOrderedDict\n]((K\x01t" + b"\x85" * 10**5 + b"K\x02ta\x85R.",
        pickle.dumps({"w": Call(eval, "1"), "os": Call(os.getcwd)}, 2),
        pickle.dumps(Call(subprocess.run, "id"), 4),
        pickle.dumps(Call(getattr, "a", "upper"), 4),
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00aK\x01sb.",  # a plain object
        b"\x80\x02" + b"ca\nb\n" * 10**5 + b".",
        b"\x80\x02}" + b"".join(b"X\x08\x00\x00\x00%08dNs" % i for i in range(40_000)) + b".",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",  # BINBYTES8 of 2⁶³ bytes
        b"\x80\x02B\xff\xff\xff\x7fab.",  # BINBYTES of 2 GB
        b"\x80\x02ctorch\nFloatStorage\n}b.",  # BUILD: __setstate__ of a dtype of NumPy
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04K\x05t\x85R.",
        b"\x80\x02",
    ],
)
def test_pickles_are_never_run(tmp_path, pickled):
    refused(archive(tmp_path / "t.pth", pickled), "holds more than weights|is damaged|no tensors")


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (Tensor(Storage("0", 4), (5,), (1,)), "reaches beyond its 16 bytes"),
        (Tensor(Storage("0", 4), (2, 2), (3, 1)), "reaches beyond"),
        (Tensor(Storage("0", 4), (2,), (1,), 3), "reaches beyond"),
        (Tensor(Storage("0", 4), (-2,), (1,)), "has shape"),
        (Tensor(Storage("0", 4), (2,), (-1,), 3), "has shape"),
        (Tensor(Storage("0", 4), (2,), (1,), -1), "has shape"),
        (Tensor(Storage("0", 4), ("2",), (1,)), "has shape"),
        (Tensor(Storage("0", 4), (1 << 2000,) * 8, (0,) * 8), "has shape"),
        (Tensor(Storage("0", 4), (2,), (1, 1)), "has shape"),
        (Tensor(Storage("0", 4), (1 << 40, 1 << 40), (0, 0)), "bytes of tensors but has only"),
        (Tensor(Storage("0", 5), (4,), (1,)), "has 16 bytes, not 5 values"),
        (Tensor(Storage("7", 4), (4,), (1,)), "'data/7' is missing"),
        (Tensor(Storage("../data.pkl", 4), (4,), (1,)), "is missing"),
        (3.5, "no tensors by name, but 'w' of type float"),
    ],
)
def test_impossible_tensors(torch_pickle, tmp_path, tensor, sentence):
    path = archive(tmp_path / "t.pth", torch_pickle({"w": tensor}), np.zeros(4, np.float32))
    refused(path, sentence)


def test_damaged_archives(torch_pickle, tmp_path):
    values = np.arange(1000, dtype=np.float32)
    pickled = torch_pickle({"w": Tensor(Storage("0", 1000), (1000,), (1,))})
    good = archive(tmp_path / "t.pth", pickled, values)
    whole = good.read_bytes()
    bad = tmp_path / "bad.pth"
    for end in (len(whole) // 2, len(whole) - 10):
        bad.write_bytes(whole[:end])
        refused(bad, "its table of contents cannot be read")
    bad.write_bytes(whole.replace(values[500].tobytes(), b"\0\0\0\0"))
    refused(bad, "cannot be read .Bad CRC-32")
    start = whole.index(b"PK\x01\x02")  # the table: point its entries beyond the end
    entry = whole.index(b"PK\x01\x02", start + 1)
    bad.write_bytes(whole[: start + 42] + struct.pack("<I", 1 << 30) + whole[start + 46 :])
    assert entry > start
    refused(bad, "'model/data.pkl' cannot be read")
    refused(archive(bad, pickled, values, compress=zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(bad, pickled, values, order=b"big"), "big-endian")
    with zipfile.ZipFile(good, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("model/data/0", bytes(4000))
    refused(good, "two of its entries have the same name")
    with zipfile.ZipFile(bad, "w") as file:
        file.writestr("readme.txt", "hello")
    refused(bad, "a zip archive without weights")


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 400]}}, "offset for tensor"),
        ({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, "invalid shape"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, "invalid shape"),
        ({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "invalid value"),
        ({"w": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, "invalid type"),
        ({"w": {"dtype": "U16", "shape": [8], "data_offsets": [0, 16]}}, "a type that is not read"),
        ({"w": {"shape": [4]}}, "missing field"),
        ({"w": 3}, "invalid type"),
        ({}, "not fully covered"),
        ('{"w": ' + "[" * 100_000, "recursion limit"),
    ],
)
def test_bad_safetensors(tmp_path, header, sentence):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(path, sentence)


def test_many_views_of_the_same_bytes(tmp_path):
    about = {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}
    text = json.dumps({f"w{i}": about for i in range(3)}).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1 << 20))
    refused(path, "invalid offset for tensor")


@pytest.mark.parametrize("size", [1 << 40, 1 << 62])
def test_an_entry_that_claims_a_terabyte(torch_pickle, tmp_path, size):
    """Its table of contents and its description agree; only the bytes are not there."""
    count = size // 4
    pickled = torch_pickle({"w": Tensor(Storage("0", count), (count,), (1,))})
    path = archive(tmp_path / "t.pth", pickled, np.zeros(4, np.float32))
    with zipfile.ZipFile(path, "a") as file:
        entry = file.getinfo("model/data/0")
        entry.file_size = entry.compress_size = size
        file._didModify = True
    refused(path, "bytes of tensors but has only|its table of contents cannot be read|is damaged")


def test_entries_that_lie_elsewhere_are_written_nowhere(torch_pickle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = torch_pickle({"w": Tensor(Storage("0", 3), (3,), (1,))})
    with zipfile.ZipFile("t.pth", "w") as file:
        file.writestr("/model/data.pkl", pickled)
        file.writestr("/model/data/0", np.float32([1, 2, 3]).tobytes())
        file.writestr("../../evil", "evil")
    np.testing.assert_array_equal(read("t.pth")["w"], [1, 2, 3])
    assert os.listdir(tmp_path) == ["t.pth"]
