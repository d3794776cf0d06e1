"""Configs refuse what cannot be built, in one sentence."""

import dataclasses
import json
import pathlib
import runpy

import pytest

from var_jax import BadInput
from var_jax.config import (
    Config,
    DataConfig,
    SamplingConfig,
    StageConfig,
    TokenizerConfig,
    TransformerConfig,
    from_dict,
)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("emoji", ()), ("emoji", ("large",)), ("emoji", ("64",)), ("imagenet", ()), ("tokenizer", ())],
)
def test_a_flag_can_set_every_field_of_an_experiment(name, variant):
    """A flag only reaches fields that the file's ConfigDict has."""
    path = pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py"
    config = runpy.run_path(str(path))["get_config"](*variant).to_dict()
    assert dataclasses.asdict(from_dict(Config, config)) == config


def test_one_number_stands_for_a_tuple_of_it():
    for top_p in (1, [1], (1.0,)):
        assert from_dict(SamplingConfig, {"top_p": top_p}).top_p == (1.0,)
    with pytest.raises(BadInput, match="must be a tuple of numbers"):
        from_dict(SamplingConfig, {"top_p": "1"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd' is not one of adamw, muon"),
        ({"mistakes": 0.2}, r"mistakes=0\.2 needs augmented_copies above 0"),
        ({"mistakes": 0.2, "augmented_copies": 1, "batch_size": 1}, "and batch_size above 1"),
        ({"batch_size": 30, "accumulate": 4}, "accumulate=4 does not divide batch_size=30"),
        ({"mistakes": 1.5, "augmented_copies": 1}, r"mistakes=1\.5; expected 0 to 1"),
    ],
)
def test_bad_stage(fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        StageConfig(**fields)


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("tokenizer", {"optimizer": "muon"}),
        ("tokenizer", {"accumulate": 2}),
        ("tokenizer", {"augmented_copies": 1}),
        ("tokenizer", {"mistakes": 0.1, "augmented_copies": 1}),
        ("tokenizer", {"label_dropout": 0.5}),
        ("tokenizer", {"label_smoothing": 0.1}),
        ("transformer", {"codebook_decay": 0.0}),
        ("transformer", {"restart_below": 0.0}),
    ],
)
def test_what_only_the_other_stage_takes(stage, fields):
    with pytest.raises(BadInput, match=f"train_{stage}.* means nothing to the {stage}; leave it"):
        from_dict(Config, {f"train_{stage}": fields})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"data": 3}, "data=3; expected the fields of DataConfig"),
        ({"train_tokenizer": {"b2": 1}}, r"train_tokenizer\.b2=1\.0; expected 0 to less than 1"),
        ({"transformer": {"depth": 0}}, r"transformer\.depth=0; expected at least 1"),
        ({"tokenizer": {"patch_nums": (2, 4)}}, r"tokenizer\.patch_nums=\(2, 4\) must start at 1"),
    ],
)
def test_sentences_name_the_section(given, sentence):
    with pytest.raises(BadInput, match=sentence):
        from_dict(Config, given)


def test_a_token_cache_has_no_mistakes():
    for stage, sentence in (
        (StageConfig(augmented_copies=1, mistakes=0.2), r"mistakes=0\.2 must be 0 with data\.tok"),
        (StageConfig(augmented_copies=3), r"augmented_copies=3 must be 0 with data\.tokens"),
    ):
        with pytest.raises(BadInput, match=sentence):
            Config(train_transformer=stage, data=DataConfig(tokens="tokens"))


def test_top_p_is_of_every_scale():
    with pytest.raises(BadInput, match=r"top_p=1\.0,0\.5 is of 2 scales"):
        Config(sampling=SamplingConfig(top_p=(1.0, 0.5)))


def test_the_shipped_checkpoint_is_of_the_large_emoji_config():
    root = pathlib.Path(__file__).parents[1]
    path = root / "configs" / "emoji.py"
    config = from_dict(Config, runpy.run_path(str(path))["get_config"]("large").to_dict())
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    shipped = root / "var_jax" / "assets" / "emoji"
    found = json.loads((shipped / "config.json").read_text())
    for part in ("tokenizer", "transformer", "sampling"):
        assert found[part] == wanted[part]
    assert set(found["trained"]) == {"train_tokenizer", "train_transformer", "data", "seed"}
    for part, value in found["trained"].items():
        assert value == wanted[part]
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"patch_nums": (2, 4)}, r"patch_nums=\(2, 4\) must start at 1 and never fall"),
        ({"patch_nums": (1, 4, 2)}, r"patch_nums=\(1, 4, 2\) must start at 1 and never fall"),
        ({"channels": 20}, "norm_groups=32 does not divide the 20 channels of a level"),
        ({"channel_mults": (1, 2), "num_res_blocks": 0}, "only residual blocks change the width"),
        ({"norm_groups": 0}, "norm_groups=0; expected at least 1"),
    ],
)
def test_bad_tokenizer(fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        TokenizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_heads": 15}, "num_heads=15 does not divide width=1024"),
        ({"dtype": "float16"}, "'float16' is not one of auto, float32, bfloat16"),
        ({"attention": "flash"}, "'flash' is not one of auto, masked"),
        ({"attention": "kernel", "num_heads": 4}, "width divides 128, not of 256"),
        ({"num_heads": 0}, r"num_heads=0; expected at least 1"),
        ({"drop_path": 1.0}, r"drop_path=1\.0; expected 0 to less than 1"),
    ],
)
def test_bad_transformer(fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        TransformerConfig(**fields)
