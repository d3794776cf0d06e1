"""A work directory goes on with its run wherever numbers made so far do not depend on a change."""

import json

import pytest
from etils import epath

from var_jax import BadInput
from var_jax.config import Config, TrainTokenizerConfig, TrainTransformerConfig, from_dict, settings
from var_jax.data.sources import open_source
from var_jax.tools import ending
from var_jax.training import workdir

INPUTS = {"fingerprint": "", "copies": 0, "networks": ""}
STARTED = {"tokenizer": 5, "transformer": 0}
AMID = {"tokenizer": 12, "transformer": 8}
DONE = {"tokenizer": 12, "transformer": 12}


def config_of(**changes):
    """A config with fields a__b changed."""
    steps = {"steps": 12, "batch_size": 16}
    config = settings(
        Config(
            train_tokenizer=TrainTokenizerConfig(**steps),
            train_transformer=TrainTransformerConfig(**steps),
        )
    )
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return from_dict(Config, config)


def resume(tmp_path, made, inputs=INPUTS, begun_with=INPUTS, **changes):
    """What config.json shall hold; None for what it holds."""
    path = epath.Path(tmp_path) / "config.json"
    if not path.exists():
        path.write_text(json.dumps(workdir.record(path, config_of(), begun_with, made)))
    return workdir.record(path, config_of(**changes), inputs, made)


def test_an_unfinished_checkpoint_is_no_step(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    for name in ("4", "8", "8.orbax-checkpoint-tmp", "damaged-9"):
        (folder / name).mkdir()
    assert workdir.count_steps(folder) == 8  # on a disk a rename is the last thing
    monkeypatch.setattr(workdir.storage, "in_bucket", lambda path: True)
    assert workdir.count_steps(folder) == 0
    (folder / "4" / "commit_success.txt").touch()
    assert workdir.count_steps(folder) == 4


FREE = {
    "every__log": 7,
    "every__save": 3,
    "every__keep": 6,
    "every__evaluate": 2,
    "every__sample": 2,
    "mesh__fsdp": 2,
    "data__source": "/moved/images",
    "data__workers": 2,
    "transformer__remat": "full",
    "transformer__attention": "masked",
    "train_transformer__accumulate": 4,
    "sampling__cfg": 3.0,
    "sampling__steps": 10,
    "report": "module:function",
    "export_dtype": "bfloat16",
}


@pytest.mark.parametrize("made", [STARTED, AMID, DONE])
def test_what_numbers_do_not_depend_on_may_change_and_is_recorded(tmp_path, capsys, made):
    about = resume(tmp_path, made, **FREE)
    (change,) = about["changes"]
    assert change.pop("after") == made
    dotted = {name.replace("__", "."): value for name, value in FREE.items()}
    assert {name: values[1] for name, values in change.items()} == dotted
    assert about["every"]["log"] == 7  # the file holds the config of the last start
    assert "config.every.log is 7 now, was 50" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert resume(tmp_path, made, **FREE) is None
    back = resume(tmp_path, made)
    assert len(back["changes"]) == 2 and back["every"]["log"] == 50


@pytest.mark.parametrize(
    "made, changes, sentence",
    [
        (AMID, {"seed": 1}, "config.seed is 0, not 1"),
        (STARTED, {"seed": 1}, "config.seed is 0, not 1"),
        (DONE, {"train_transformer__learning_rate": 0.5}, "learning_rate is 0.0001, not 0.5"),
        (DONE, {"train_transformer__batch_size": 32}, "batch_size is 16, not 32"),
        (DONE, {"transformer__depth": 2}, "transformer.depth is 16, not 2"),
        (DONE, {"transformer__dtype": "bfloat16"}, "transformer.dtype is auto, not bfloat16"),
        (AMID, {"tokenizer__beta": 1.0}, "tokenizer.beta is 0.25, not 1.0"),
        (AMID, {"data__flip": True}, "data.flip is False, not True"),
        (AMID, {"data__tokens": "cache"}, "data.tokens is , not cache"),
        (AMID, {"pretrained_tokenizer": "emoji"}, "pretrained_tokenizer is , not emoji"),
        (DONE, {"init_from": "emoji"}, "init_from is , not emoji"),
        (AMID, {"seed": 1, "data__shift": 3}, "config.data.shift is 0, not 3; config.seed is 0, n"),
        (AMID, {"train_transformer__steps": 7}, "train_transformer.steps is 12, not 7"),
        (AMID, {"train_tokenizer__steps": 20}, "train_tokenizer.steps is 12, not 20"),
    ],
)
def test_what_numbers_depend_on_may_not_change(tmp_path, made, changes, sentence):
    with pytest.raises(BadInput, match=r"belongs to a run whose .*: set back what differs"):
        resume(tmp_path, made, **changes)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(BadInput) as error:
        resume(tmp_path, made, **changes)
    assert sentence in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    "made, changes",
    [
        (STARTED, {"train_transformer__learning_rate": 0.5, "transformer__depth": 2}),
        (STARTED, {"train_tokenizer__steps": 20}),
        ({"tokenizer": 0, "transformer": 0}, {"seed": 1, "train_tokenizer__learning_rate": 0.5}),
        (AMID, {"train_transformer__steps": 8}),
    ],
)
def test_what_has_made_no_numbers_yet_may_change(tmp_path, made, changes):
    assert resume(tmp_path, made, **changes)["changes"]


def test_a_longer_run_is_told(tmp_path, capsys):
    resume(tmp_path, DONE, train_transformer__steps=40)
    said = capsys.readouterr().err
    assert "the transformer goes on to step 40; its schedules are now of that many" in said


@pytest.mark.parametrize("name", ["fingerprint", "copies", "networks"])
def test_other_weights_or_copies_behind_a_path_are_refused(tmp_path, name):
    moved = {"pretrained_tokenizer": "moved"}
    path = epath.Path(tmp_path) / "config.json"
    first = config_of(pretrained_tokenizer="here")
    path.write_text(json.dumps(workdir.record(path, first, INPUTS, AMID)))
    assert workdir.record(path, config_of(**moved), INPUTS, AMID)["changes"]
    with pytest.raises(BadInput, match=r"held (other weights|another number of copies) than"):
        workdir.record(path, config_of(**moved), INPUTS | {name: 3}, AMID)
    path.write_text(json.dumps(settings(first)))  # of an older version, which recorded none
    assert workdir.record(path, config_of(**moved), INPUTS | {name: 3}, AMID)


def test_occupying_writes_once_and_keeps_what_is_there(tmp_path):
    splits = {split: open_source("emoji", split, 16) for split in ("train", "validation")}
    folder = epath.Path(tmp_path / "run")
    workdir.occupy(folder, config_of(), INPUTS, splits)
    assert ending.process.log == folder / "error.log"
    ending.process.log = None
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "data.json"} <= names
    (folder / "transformer" / "8").mkdir(parents=True)
    (folder / "transformer" / "10.orbax-checkpoint-tmp").mkdir()
    assert workdir.count_steps(folder / "transformer") == 8
    before = (folder / "config.json").read_text()
    with pytest.raises(BadInput, match=r"config\.seed is 0, not 1"):
        workdir.occupy(folder, config_of(seed=1), INPUTS, splits)
    assert (folder / "config.json").read_text() == before
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match=r"holds checkpoints but no config\.json"):
        workdir.occupy(folder, config_of(), INPUTS, splits)
    assert not (folder / "config.json").exists()
