"""Exports are self-describing, bit-exact, replaced as a whole, and have a fingerprint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from test_training import _abstract, _assert_same, _damage, _largest, _mesh

from var_jax import BadInput
from var_jax.checkpoints import export


def _weights(dtype=jnp.bfloat16):
    return {"a": jax.random.normal(jax.random.key(3), (64, 128), dtype), "ids": jnp.arange(5)}


@pytest.mark.parametrize("small", [0, export.MAX_COMPRESSED], ids=["stored", "compressed"])
def test_weights_are_small_and_bit_exact(tmp_path, monkeypatch, small):
    monkeypatch.setattr(export, "MAX_COMPRESSED", small)
    keys = jax.random.split(jax.random.key(0), 50)
    tree = {f"layer{i}": jax.random.normal(k, (250, 400), jnp.bfloat16) for i, k in enumerate(keys)}
    export.save_export(tmp_path / "model", tree, {"depth": 2})
    files = [p for p in (tmp_path / "model").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 11e6 and len(files) < 15
    _assert_same(export.load_weights(tmp_path / "model", _abstract(tree)), tree)
    assert export.export_config(tmp_path / "model")["depth"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_load_into_another_dtype_and_mesh(tmp_path):
    export.save_export(tmp_path / "model", _weights(), {})
    sharding = NamedSharding(_mesh(2, 4), PartitionSpec("data", "fsdp"))
    abstract = _abstract(_weights())
    abstract["a"] = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding)
    loaded = export.load_weights(tmp_path / "model", abstract)
    assert loaded["a"].sharding == sharding
    _assert_same(loaded, _weights() | {"a": _weights()["a"].astype(jnp.float32)})


def test_weights_replace_an_older_checkpoint_and_nothing_else(tmp_path):
    for depth in (1, 2):
        export.save_export(tmp_path / "model", _weights(), {"depth": depth})
    assert export.export_config(tmp_path / "model")["depth"] == 2
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BadInput, match=r"holds '(model|thesis\.tex)'; expected a new directory"):
        export.save_export(tmp_path, _weights(), {})
    assert (tmp_path / "thesis.tex").exists()


def test_weights_that_cannot_be_loaded_say_why(tmp_path):
    abstract = _abstract(_weights())
    with pytest.raises(BadInput, match="model is not a checkpoint: it does not exist"):
        export.load_weights(tmp_path / "model", abstract)
    export.save_export(tmp_path / "model", _weights(), {})
    wrong = abstract | {"a": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)}
    with pytest.raises(BadInput, match=r"'a' with shape \(64, 128\); expected \(64, 64\)"):
        export.load_weights(tmp_path / "model", wrong)
    for how, reason in (("flipped", "fails its checksum"), ("cut", "bytes; expected")):
        _damage(_largest(tmp_path / "model", "d/*"), how)
        with pytest.raises(BadInput, match=f"model/weights is damaged: .* {reason}"):
            export.load_weights(tmp_path / "model", abstract)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(BadInput, match="it has no config"):
        export.export_config(tmp_path / "model")


@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 3
    depth: int = 1


class Model(nnx.Module):
    def __init__(self, dtype):
        self.config = Size(width=4)
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (4, 4)).astype(dtype))


def test_a_fingerprint_is_read_or_computed_alike(tmp_path, monkeypatch):
    stored, folder = Model(jnp.bfloat16), tmp_path / "model"
    loaded = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    expected = export.fingerprint(loaded)
    assert expected != export.fingerprint(Model(jnp.float32))
    export.save_export(folder, {"net": stored, "other": {"x": jnp.zeros(3)}}, {"width": 4})
    config = export.export_config(folder)
    assert config == {"width": 4, "fingerprints": {"net": expected}}
    with monkeypatch.context() as patch:
        patch.delattr(export, "fingerprint")
        assert export.load_fingerprint(folder, "net", loaded) == expected
    (folder / "config.json").write_text(json.dumps({"width": 4}))  # an older export
    assert export.load_fingerprint(folder, "net", loaded) == expected


def test_the_export_in_the_package():
    assert export.export_config("emoji")["class_names"][0] == "Smileys & Emotion"
    assert export.find_export("emoji") == export.find_export(str(export.find_export("emoji")))


def test_a_folder_that_is_no_export_hides_none_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)
    assert export.export_config("emoji")
    with pytest.raises(BadInput, match="is not a checkpoint"):
        export.export_config(".")
