"""--checkpoint and its like name what lies there instead of a checkpoint, and what to do."""

import json
import shutil

import numpy as np
import pytest
from running import TINY, complaint

from var_jax.checkpoints.torch.pth import write_pth


@pytest.fixture
def places(untrained, tmp_path):
    """A work directory that has ended, one that has not, a folder of both, a file of PyTorch."""
    for name in ("done", "begun"):
        (tmp_path / name / "transformer" / "100" / "state").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
        (tmp_path / name / "config.json").write_text('{"tokenizer": {}, "transformer": {}}')
    for name in ("done/checkpoint", "many/a", "many/b"):
        shutil.copytree(untrained, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "readme.txt").touch()
    write_pth(tmp_path / "t.pth", {"w": np.zeros(3, np.float32)})
    return tmp_path


SENTENCES = {
    "done": "it is a work directory; its checkpoint is {}/done/checkpoint",
    "done/transformer": "{0}/done is the work directory of a run, whose checkpoint is {0}/done/che",
    "done/transformer/100": "{0}/done is the work directory of a run, whose checkpoint is {0}/done",
    "begun": "{}/begun is the work directory of a run that has not ended; the command that began",
    "begun/transformer/100": "{}/begun is the work directory of a run that has not ended",
    "many": "it holds checkpoints: a, b; name one of them",
    "t.pth": "it is a file of PyTorch, which `python -m var_jax.convert --tokenizer {}/t.pth",
    "readme.txt": "it is a file; expected a directory with config.json and weights",
    "empty": "it has no config.json; expected a directory",
    "half": "it has no weights; expected a directory",
    "nowhere": "it does not exist; expected a directory",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_each_place(places, name):
    expected = f"{places / name} is not a checkpoint: {SENTENCES[name].format(places)}"
    for command, *flags in (
        ("sample", "--num", 1, "--checkpoint", places / name),
        ("encode", "--images", "emoji", "--checkpoint", places / name),
        ("convert", "--to_torch", places / "out", "--checkpoint", places / name),
        ("train", "--config", TINY, f"--config.pretrained_tokenizer={places / name}"),
    ):
        assert expected in complaint(command, *flags), command


def damaged(name, change):
    return pytest.param(change, id=name)


def with_(section, **fields):
    def change(about):
        about[section] |= fields

    return change


def without(name):
    return lambda about: about.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        damaged("no classes", without("class_names")),
        damaged("no tokenizer", without("tokenizer")),
        damaged("a million layers", with_("transformer", depth=10**9)),
        damaged("a wide layer", with_("transformer", width=2 * 10**12)),
        damaged("blocks", with_("tokenizer", num_res_blocks=10**9)),
        damaged("levels", with_("tokenizer", channel_mults=[1] * 10**5)),
        damaged("scales", with_("tokenizer", patch_nums=[1] * 10**5)),
        damaged("a long scale", with_("tokenizer", patch_nums=[1, 10**9])),
        damaged("codes", with_("tokenizer", vocab_size=10**15)),
        damaged("phis", with_("tokenizer", num_phi=10**9)),
        damaged("text", with_("tokenizer", channels="many")),
        damaged("an unknown field", with_("tokenizer", __class__="os.system")),
        damaged("classes are a number", lambda about: about.update(class_names=5)),
        damaged("classes are numbers", lambda about: about.update(class_names=[{}] * 9)),
        damaged("too many classes", lambda about: about.update(class_names=["a"] * 10)),
        damaged("sampling", lambda about: about.update(sampling={"top_p": "x"})),
    ],
)
def test_a_config_that_claims_anything(untrained, tmp_path, change):
    folder = shutil.copytree(untrained, tmp_path / "checkpoint")
    about = json.loads((folder / "config.json").read_text())
    about.pop("checksums")
    change(about)
    (folder / "config.json").write_text(json.dumps(about))
    err = complaint("sample", "--num", 1, "--checkpoint", folder, "--out", tmp_path / "out")
    assert str(folder) in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 10**6, '{"a": ' * 10**5, "\xff", "1"]
)
def test_a_config_that_is_none(untrained, tmp_path, text):
    folder = shutil.copytree(untrained, tmp_path / "checkpoint")
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert str(folder) in complaint("sample", "--num", 1, "--checkpoint", folder)
