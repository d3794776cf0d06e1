"""Every file of a checkpoint, changed in every way, one at a time: reported, nothing lost."""

import collections
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import BadInput
from var_jax.checkpoints import export
from var_jax.checkpoints.training import Checkpoints

STATE = {"w": np.arange(2000.0, dtype=np.float32), "step": np.full((), 3, np.int32)}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)
WAYS = ("deleted", "emptied", "cut", "longer", "first", "middle", "last", "replaced")


def tamper(path, way):
    content = bytearray(path.read_bytes())
    if way == "deleted":
        return path.unlink()
    if way in ("first", "middle", "last") and content:
        content[{"first": 0, "middle": len(content) // 2, "last": -1}[way]] ^= 1
    elif way == "longer":
        content += b"\0"
    elif way == "replaced":
        content = os.urandom(len(content))
    else:
        content = content[: len(content) // 2 if way == "cut" else 0]
    path.write_bytes(content)


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "work"
    run = Checkpoints(folder)
    for step in (1, 2):
        run.save(step, jax.tree.map(jnp.asarray, STATE), {"next": step})
    run.close()
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_training_checkpoint(trained, tmp_path, way, capsys):
    names = [path.relative_to(trained) for path in files(trained / "2")]
    assert len(names) >= 7
    for i, name in enumerate(names):
        run = shutil.copytree(trained, tmp_path / str(i))
        if not (run / name).read_bytes() and way in ("emptied", "cut", "replaced", *WAYS[4:7]):
            continue  # an empty file stays what it is
        tamper(run / name, way)
        capsys.readouterr()
        checkpoints = Checkpoints(run)
        step, state, data = checkpoints.restore(ABSTRACT)
        checkpoints.close()
        err = capsys.readouterr().err
        jax.tree.map(np.testing.assert_array_equal, state, STATE)
        if (name.name, way) == ("files.json", "deleted"):
            assert (step, data) == (2, {"next": 2}) and "files.json is missing" in err
        else:
            assert (step, data) == (1, {"next": 1}), (name, err)
            assert "cannot be read" in err and "damaged-2" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("where", ["", "state", "state/d", "state/ocdbt.process_0"])
def test_a_file_beside_those_of_a_checkpoint_does_no_harm(trained, tmp_path, where, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in (".DS_Store", "Thumbs.db", "notes.txt~", "0" * 32):
        (run / "2" / where / name).parent.mkdir(exist_ok=True)
        (run / "2" / where / name).write_bytes(b"stray")
    checkpoints = Checkpoints(run)
    assert checkpoints.restore(ABSTRACT)[0] == 2
    checkpoints.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_export(tmp_path, way, capsys):
    whole = tmp_path / "whole"
    export.save_export(whole, STATE, {"tokenizer": {"depth": 2, "width": 64, "ratio": 0.5}})
    for i, path in enumerate(files(whole)):
        folder = shutil.copytree(whole, tmp_path / str(i))
        changed = folder / path.relative_to(whole)
        if not changed.read_bytes() and way in ("emptied", "cut", "replaced", *WAYS[4:7]):
            continue
        tamper(changed, way)
        capsys.readouterr()
        if (path.name, way) == ("files.json", "deleted"):
            weights = export.load_weights(folder, ABSTRACT)
            jax.tree.map(np.testing.assert_array_equal, weights, STATE)
            assert "files.json is missing" in capsys.readouterr().err
            continue
        with pytest.raises(BadInput) as raised:
            export.load_weights(folder, ABSTRACT)
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.slow
def test_each_bit_of_a_config_is_watched(tmp_path, capsys):
    config = {"tokenizer": {"depth": 2}, "class_names": ["a", "b"], "sampling": {"cfg": 1.5}}
    export.save_export(tmp_path / "model", STATE, config)
    path = tmp_path / "model" / "config.json"
    text, found = path.read_bytes(), export.export_config(tmp_path / "model")
    outcomes = collections.Counter()
    for i in range(8 * len(text)):
        changed = bytearray(text)
        changed[i // 8] ^= 1 << i % 8
        path.write_bytes(changed)
        export.warn.cache_clear()
        capsys.readouterr()
        try:
            read = export.export_config(tmp_path / "model")
        except BadInput as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        warned = f"warning: {path}: " in capsys.readouterr().err
        same = {name: read[name] for name in found if name in read} == found
        assert warned or same, changed
        assert read.get("tokenizer") == found["tokenizer"], changed
        outcomes["warned" if warned else "same"] += 1
    assert min(outcomes.values()) > 9 and len(outcomes) == 3, outcomes


def test_what_a_user_changes_in_a_config_is_used_and_told(tmp_path, capsys):
    config = {"tokenizer": {"depth": 2}, "class_names": ["a", "b"], "sampling": {"cfg": 1.5}}
    folder = tmp_path / "model"
    export.save_export(folder, STATE, config)
    about = json.loads((folder / "config.json").read_text())
    about["sampling"]["cfg"], about["class_names"][1] = 4.0, "dog"
    (folder / "config.json").write_text(json.dumps(about, indent=4))
    for _ in range(2):
        found = export.export_config(folder)
        assert (found["sampling"], found["class_names"]) == ({"cfg": 4.0}, ["a", "dog"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{folder}/config.json: class_names, sampling is not as" in err
    about["tokenizer"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(BadInput, match="tokenizer is not as it was written with the weights"):
        export.export_config(folder)
    del about["checksums"]
    (folder / "config.json").write_text(json.dumps(about))
    assert export.export_config(folder)["tokenizer"] == {"depth": 3}
