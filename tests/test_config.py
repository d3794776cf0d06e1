"""Configs refuse what cannot be built, in one sentence."""

import dataclasses
import json
import pathlib
import runpy

import pytest

import var_jax
from var_jax import BadInput
from var_jax.checkpoints import hub
from var_jax.config import (
    Config,
    DataConfig,
    GanConfig,
    SamplingConfig,
    TokenizerConfig,
    TrainTokenizerConfig,
    TrainTransformerConfig,
    TransformerConfig,
    from_dict,
    settings,
)
from var_jax.schedule import shapes
from var_jax.tools.configs import config_name, load_config


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("emoji", ()),
        ("emoji", ("large",)),
        ("emoji", ("64",)),
        ("fashion", ()),
        ("fashion", ("large",)),
        ("ladder", ("4",)),
        ("ladder", ("full_16",)),
        ("ladder", ("tokenizer",)),
        ("baselines", ("raster",)),
        ("baselines", ("dit",)),
        ("baselines", ("raster:1.4b",)),
        ("baselines", ("dit:xl2",)),
        ("versus", ("raster",)),
        ("versus", ("dit",)),
        ("versus", ("var_4x4",)),
        ("versus", ("dit_4x4",)),
        ("versus", ("raster_4x4",)),
        ("ablation", ("raster",)),
        ("ablation", ("larger",)),
        ("imagenet", ()),
        ("imagenet", ("d36",)),
        ("imagenet", ("d16:landscape",)),
        ("tokenizer", ()),
        ("tokenizer", ("512_patchgan",)),
        ("finetune", ("emoji",)),
        ("finetune_tokenizer", ("emoji",)),
    ],
)
def test_a_flag_can_set_every_field_of_an_experiment(name, variant):
    """A flag only reaches fields that the file's ConfigDict has."""
    path = pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py"
    config = runpy.run_path(str(path))["get_config"](*variant).to_dict()
    assert settings(from_dict(Config, config)) == config


def test_fine_tuning_takes_official_weights_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hub.cache().mkdir(parents=True)
    converted = pathlib.Path(var_jax.__file__).parent / "assets/emoji"  # in place of a download
    pathlib.Path(hub.folder("hub:d16")).symlink_to(converted)
    config = from_dict(Config, load_config("finetune:hub:d16"))
    assert config.init_from == config.pretrained_tokenizer == "hub:d16"
    assert config.transformer.depth == 6 and config_name("finetune:hub:d16") == "finetune-hub-d16"


def test_landscape_and_portrait_of_the_papers_models():
    wide, high = (
        from_dict(Config, load_config(f"imagenet:d20:{s}")) for s in ("landscape", "portrait")
    )
    assert wide.data.size == (224, 336) and high.data.size == (336, 224)
    turned = [shape[::-1] for shape in shapes(wide.tokenizer.patch_nums)]
    assert list(shapes(high.tokenizer.patch_nums)) == turned
    assert wide.transformer.num_tokens == high.transformer.num_tokens == 700
    for height, width in shapes(wide.tokenizer.patch_nums)[2:]:  # within half a token of 2 : 3
        assert abs(width - 1.5 * height) <= 0.5
    for variant in ("d16:square", "d36:landscape", "d17"):
        with pytest.raises(BadInput, match="has the variants d16, d20"):
            load_config(f"imagenet:{variant}")


OBLONG = {
    "tokenizer": {"patch_nums": [1, 2, [2, 3], (4, 4), (4, 6)], "channel_mults": (1, 1, 1)},
    "data": {"size": [16, 24]},
}


def test_sizes_are_sides_or_pairs():
    config = from_dict(Config, OBLONG)
    assert config.tokenizer.patch_nums == config.transformer.patch_nums
    assert config.tokenizer.patch_nums == (1, 2, (2, 3), 4, (4, 6))  # one way to say a square
    assert config.transformer.blocks == (1, 4, 6, 16, 24)
    assert config.data.size == config.tokenizer.image_size == (16, 24)
    written = json.loads(json.dumps(settings(config)))
    assert written["tokenizer"]["patch_nums"] == [1, 2, [2, 3], 4, [4, 6]]
    assert from_dict(Config, written) == config


@pytest.mark.parametrize(
    ("section", "fields", "sentence"),
    [
        ("data", {"size": (24, 16)}, r"\(4, 6\), but images of data.size=\(24, 16\) .* 6 x 4\."),
        ("data", {"size": (16, 24, 3)}, r"data\.size=\(16, 24, 3\) must be an integer or a pair"),
        ("data", {"size": (16, "a")}, r"data\.size=\(16, 'a'\) must be an integer or a pair"),
        ("data", {"size": (0, 24)}, r"data\.size=\(0, 24\); expected at least 1"),
        ("data", {"shift": (1, 2)}, r"data\.shift=\(1, 2\) is of type tuple, expected int"),
        ("tokenizer", {"patch_nums": (1, (2, 3.5))}, "must be a tuple of integers or pairs"),
        ("tokenizer", {"patch_nums": (1, ((2, 3), 4))}, "must be a tuple of integers or pairs"),
    ],
)
def test_bad_sizes(section, fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        from_dict(Config, OBLONG | {section: OBLONG[section] | fields})


def test_one_number_stands_for_a_tuple_of_it():
    for top_p in (1, [1], (1.0,)):
        assert from_dict(SamplingConfig, {"top_p": top_p}).top_p == (1.0,)
    with pytest.raises(BadInput, match="must be a tuple of numbers"):
        from_dict(SamplingConfig, {"top_p": "1"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"schedule": "step"}, "schedule='step' is not one of lin0, cos"),
        ({"batch_size": 30, "accumulate": 4}, "accumulate=4 does not divide batch_size=30"),
        ({"student_forcing": -1.0}, r"student_forcing=-1\.0; expected"),
        ({"student_forcing": 0.1, "progressive": 0.5}, r"student_forcing=0\.1 reads all scales"),
        ({"student_forcing": 0.1, "token_noise": 0.2}, r"student_forcing=0\.1 keeps to what"),
        ({"token_noise": 1.5}, r"token_noise=1\.5; expected 0 to 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1; expected at least 0"),
    ],
)
def test_bad_training(fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        TrainTransformerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lpips_weight": 1}, r"lpips_weight=1\.0 takes images of 32 pixels .* data\.size=16"),
        ({"gan": {"weight": 1}}, r"gan\.layers=3 takes images of 24 pixels .* data\.size=16"),
        ({"gan": {"layers": 10**9}}, r"gan\.layers=1000000000 is beyond any model; .* at most 12"),
        ({"gan": {"weight": 1, "layers": 2, "start": 9}}, r"gan\.start=9 leaves .* steps=9"),
        (
            {"gan": {"discriminator": "cnn"}},
            r"train_tokenizer\.gan\.discriminator='cnn' is not one",
        ),
        (
            {"gan": {"dino_file": "a.pth"}},
            r"dino_file=a\.pth is of discriminator='dino', not 'patc",
        ),
        (
            {"gan": {"weight": 1, "layers": 2, "start": 4, "ramp": 6}},
            r"gan\.start=4 and gan\.ramp=6 end after steps=9, .* a sum of at most 9",
        ),
        (
            {"gan": {"weight": 1, "layers": 2, "start": 2}, "kmeans_steps": 3},
            r"gan\.start=2 lets .* learn in the first kmeans_steps=3, .* expected at least 3",
        ),
        (
            {"gan": {"weight": 1, "layers": 2, "learning_rate": 0}},
            r"gan\.learning_rate=0\.0 leaves the discriminator of weight=1\.0 as random as it st",
        ),
        (
            {"gan": {"discriminator": "dino", "layers": 2}},
            r"gan\.layers=2 is of discriminator='patchgan', not 'dino'; expected 3,",
        ),
        (
            {"gan": {"discriminator": "dino", "channels": 32}},
            r"gan\.channels=32 is of discriminator='patchgan', not 'dino'; expected 64,",
        ),
        ({"entropy_weight": 0.1}, r"entropy_weight=0\.1 moves .* codebook_decay=0\.99 makes them"),
        ({"kmeans_steps": 1, "codebook_decay": 0}, r"codebook_decay=0 learns codes by gradient"),
        ({"kmeans_steps": 9}, r"kmeans_steps=9 leaves nothing of steps=9"),
        ({"decoder_only": True, "kmeans_steps": 1}, r"kmeans_steps=1 is of the .* decoder_only"),
        ({"decoder_only": True, "entropy_weight": 1}, r"entropy_weight=1\.0 is of the encoder"),
        ({"restart_by_scale": True, "codebook_restart": 0}, r"codebook_restart=0 restarts none"),
        ({"lpips_file": "vgg16.ckpt"}, r"lpips_file=vgg16\.ckpt is of lpips_weight, which is 0"),
        ({"dtype": "float16"}, r"dtype='float16' is not one of auto, float32, bfloat16"),
        ({"l2_weight": 0}, r"l2_weight=l1_weight=lpips_weight=0 leaves nothing"),
        ({"perturbation": 2}, r"perturbation=2\.0; expected 0 to 1"),
        ({"scale_dropout": 0.1}, r"keeps at least 3 scales; tokenizer\.patch_nums=\(1, 2, 4\) has"),
    ],
)
def test_losses_that_do_not_fit(fields, sentence):
    tokenizer = {"patch_nums": (1, 2, 4), "channel_mults": (1, 1, 1)}
    training = {"steps": 9, "l2_weight": 1} | fields
    with pytest.raises(BadInput, match=sentence):
        from_dict(
            Config, {"tokenizer": tokenizer, "train_tokenizer": training, "data": {"size": 16}}
        )


def test_options_that_just_fit():
    gan = GanConfig(weight=1, start=3, ramp=6)
    TrainTokenizerConfig(steps=9, gan=gan, kmeans_steps=3)
    TrainTokenizerConfig(steps=9, entropy_weight=0.1, codebook_decay=0)


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ("tokenizer", "accumulate"),
        ("tokenizer", "label_dropout"),
        ("transformer", "codebook_decay"),
    ],
)
def test_what_only_the_other_training_takes(training, field):
    with pytest.raises(BadInput, match=f"train_{training} has no field '{field}'; its fields are"):
        from_dict(Config, {f"train_{training}": {field: 1}})


def test_what_both_models_share_is_said_once():
    config = from_dict(Config, {"tokenizer": {"vocab_size": 64}})
    assert config.transformer.vocab_size == 64
    with pytest.raises(
        BadInput, match=r"transformer\.vocab_size=32, but the tokenizer's is 64; say"
    ):
        from_dict(Config, {"tokenizer": {"vocab_size": 64}, "transformer": {"vocab_size": 32}})


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


def test_a_token_cache_has_no_noise():
    with pytest.raises(BadInput, match=r"token_noise=0\.2 must be 0 with data\.tokens"):
        training = TrainTransformerConfig(token_noise=0.2)
        Config(train_transformer=training, data=DataConfig(tokens="tokens"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"transformer": {"kind": "raster"}}, r"transformer\.kind=raster with patch_nums"),
        ({"tokenizer": {"patch_nums": (16,)}}, r"transformer\.kind=var with patch_nums=\(16,\)"),
        (
            {"transformer": {"kind": "dit"}, "train_transformer": {"token_noise": 0.2}},
            r"train_transformer\.token_noise=0\.2 is of tokens; a dit is trained on latents",
        ),
        (
            {"transformer": {"kind": "dit"}, "train_transformer": {"student_forcing": 0.1}},
            r"train_transformer\.student_forcing=0\.1 needs a model that predicts one scale after",
        ),
        (
            {"transformer": {"kind": "dit", "window": 2}},
            r"transformer\.kind=dit with .*: window=2 counts scales, which only VAR predicts",
        ),
        (
            {"transformer": {"window": 1, "adaln": False}},
            r"transformer\.window=1 needs adaln=True",
        ),
        (
            {"transformer": {"kind": "dit"}, "data": {"tokens": "tokens"}},
            r"data\.tokens=tokens is of tokens; a dit is trained on latents",
        ),
    ],
)
def test_transformers_that_cannot_be_trained(given, sentence):
    """Where no transformer is trained, a tokenizer of a single scale needs no kind."""
    training = {"steps": 1} | given.get("train_transformer", {})
    with pytest.raises(BadInput, match=sentence):
        from_dict(Config, given | {"train_transformer": training})
    if "tokenizer" in given:
        assert from_dict(Config, given).transformer.num_tokens == 256


def test_top_p_is_of_every_scale():
    with pytest.raises(BadInput, match=r"top_p=1\.0,0\.5 has 2 numbers"):
        Config(sampling=SamplingConfig(top_p=(1.0, 0.5)))


def test_the_shipped_checkpoint_is_of_the_large_emoji_config():
    root = pathlib.Path(__file__).parents[1]
    path = root / "configs" / "emoji.py"
    config = from_dict(Config, runpy.run_path(str(path))["get_config"]("large").to_dict())
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    shipped = root / "var_jax" / "assets" / "emoji"
    found = json.loads((shipped / "config.json").read_text())
    assert found["tokenizer"].pop("skip")  # of the version that trained it
    found["transformer"]["num_classes"] = 0
    found["sampling"]["top_k"] = [found["sampling"]["top_k"]]  # of a version that had one number
    for part in ("tokenizer", "transformer", "sampling"):
        default = json.loads(json.dumps(dataclasses.asdict(type(getattr(config, part))())))
        assert default | found[part] == wanted[part]  # fields newer than the checkpoint
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"patch_nums": (2, 4)}, r"patch_nums=\(2, 4\) must start at 1 and never fall"),
        ({"patch_nums": (1, 4, 2)}, r"patch_nums=\(1, 4, 2\) must start at 1 and never fall"),
        ({"patch_nums": (0,)}, r"patch_nums=\(0,\) must start at 1"),
        ({"patch_nums": ((1, 2), 4)}, r"patch_nums=\(\(1, 2\), 4\) must start at 1"),
        ({"patch_nums": (1, (2, 3), (4, 2))}, r"patch_nums=\(1, \(2, 3\), \(4, 2\)\) must"),
        ({"patch_nums": ((0, 4),)}, r"patch_nums=\(\(0, 4\),\) must start at 1"),
        ({"patch_nums": (1, (2, 999))}, r"patch_nums=\(1, \(2, 999\)\) is beyond any model"),
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


def test_a_mistake_in_what_a_config_imports_is_said(tmp_path, monkeypatch):
    (tmp_path / "helper_of_mine.py").write_text("\n" * 200 + "x = (\n")
    (tmp_path / "mine.py").write_text("import helper_of_mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=r"mine.py, line 1: SyntaxError: .* in 'import helper_of"):
        load_config(str(tmp_path / "mine.py"))


def test_guidance_of_a_class_that_is_never_withheld():
    fields = {"train_transformer": {"steps": 9, "label_dropout": 0}}
    with pytest.raises(BadInput, match=r"sampling\.cfg=1\.5 guides away .*label_dropout=0 never"):
        from_dict(Config, fields)
    from_dict(Config, fields | {"sampling": {"cfg": 0}})
