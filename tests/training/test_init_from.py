"""Fine-tuning starts from the weights of an export, where classes and schedule may differ."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from test_tasks import TOKENIZER, TRANSFORMER

from var_jax import BadInput
from var_jax.config import (
    Config,
    DataConfig,
    SamplingConfig,
    TrainTokenizerConfig,
    TrainTransformerConfig,
)
from var_jax.models.other_schedule import tokenizer_at
from var_jax.models.patch_codec import make_tokenizer
from var_jax.models.resize import bicubic_matrix
from var_jax.models.var import Transformer
from var_jax.sampling.exports import save_parts
from var_jax.sharding.mesh import make_mesh, shard
from var_jax.training.checks import check_rounding, check_start, check_tokenizer
from var_jax.training.init_from import transformer_from

NAMES = tuple("abcdefghi")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The folder of an export, and its transformer."""
    folder = tmp_path_factory.mktemp("export") / "checkpoint"
    old = random_transformer(TRANSFORMER, 0)
    tokenizer = jax.eval_shape(lambda: make_tokenizer(TOKENIZER, rngs=nnx.Rngs(0)))
    tokenizer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tokenizer)
    save_parts(folder, {"tokenizer": tokenizer, "transformer": old}, NAMES, SamplingConfig())
    return str(folder), old


def random_transformer(config, seed):
    return random(lambda: Transformer(config, rngs=nnx.Rngs(0)), seed)


def random_tokenizer(config, seed):
    return random(lambda: make_tokenizer(config, rngs=nnx.Rngs(0)), seed)


def random(model, seed):
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.numpy.asarray(rng.normal(size=x.shape).astype("f4"))
    return jax.tree.map(draw, jax.eval_shape(model))


def started(export, names=NAMES, **change):
    """A transformer started from the export, and what it was before."""
    config = dataclasses.replace(TRANSFORMER, num_classes=len(names), **change)
    fresh = random_transformer(config, 1)
    return transformer_from(fresh, export[0], tuple(names)), fresh


def test_the_same_model_takes_every_weight(export):
    made, _ = started(export)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(export[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_classes_are_matched_by_name(export):
    made, fresh = started(export, names=("new", "c", "a"))
    table, old = made.class_embed[...], export[1].class_embed[...]
    np.testing.assert_array_equal(table[1:], old[np.array([2, 0, -1])])  # the last is "no class"
    np.testing.assert_array_equal(table[0], fresh.class_embed[...][0])


def test_positions_of_another_schedule_are_interpolated(export):
    made, _ = started(export, patch_nums=(1, 2, 8))
    old = export[1].pos_embed[...]
    np.testing.assert_allclose(made.pos_embed[...][:5], old[:5], atol=1e-6)  # the same two scales
    fine = np.asarray(made.pos_embed[...][5:]).reshape(4, 2, 4, 2, -1).mean((1, 3))
    coarse = np.asarray(old[5:]).reshape(4, 4, -1)
    assert np.corrcoef(fine.ravel(), coarse.ravel())[0, 1] > 0.9
    longer, _ = started(export, patch_nums=(1, 1, 2, 3, 4))
    np.testing.assert_array_equal(
        longer.level_embed[...], export[1].level_embed[...][np.array([0, 0, 1, 2, 2])]
    )


def test_positions_of_an_oblong_schedule_are_interpolated(export):
    wide, _ = started(export, patch_nums=(1, 2, (4, 6)))
    old = np.asarray(export[1].pos_embed[...])
    np.testing.assert_allclose(wide.pos_embed[...][:5], old[:5], atol=1e-6)
    fine = np.asarray(wide.pos_embed[...][5:]).reshape(4, 6, -1)
    columns = bicubic_matrix(4, 6)  # the height stays, the width grows
    wanted = np.einsum("Ww,hwD->hWD", columns, old[5:].reshape(4, 4, -1))
    np.testing.assert_allclose(fine, wanted, atol=1e-5)


def test_another_vocabulary_starts_a_fresh_head(export):
    made, fresh = started(export, vocab_size=32, latent_dim=8)
    for name in ("head", "head_bias", "word"):
        np.testing.assert_array_equal(getattr(made, name)[...], getattr(fresh, name)[...])
    np.testing.assert_array_equal(made.blocks.fc1[...], export[1].blocks.fc1[...])


def test_weights_stay_where_they_lie(export):
    mesh = make_mesh(2, 2, 2)
    fresh = random_transformer(TRANSFORMER, 1)
    places = jax.tree.map(lambda leaf: leaf.sharding, shard(fresh, mesh, Transformer.layout))
    with jax.set_mesh(mesh):
        made = transformer_from(jax.device_put(fresh, places), export[0], NAMES)
    same = jax.tree.map(lambda leaf, place: leaf.sharding == place, made, places)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(("field", "value"), [("depth", 3), ("width", 32), ("qk_norm", False)])
def test_another_size_is_refused(export, field, value):
    with pytest.raises(BadInput, match=rf"holds a transformer with {field}=.* but config"):
        started(export, **{field: value})


def test_another_size_is_refused_before_anything_is_computed(export):
    config = Config(
        tokenizer=TOKENIZER, transformer=dataclasses.replace(TRANSFORMER, width=32),
        data=DataConfig(size=16), train_transformer=TrainTransformerConfig(steps=1),
        pretrained_tokenizer=export[0], init_from=export[0],
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"init_from=.* with width=64, but config.* is 32"):
        check_start(config)


@pytest.mark.parametrize("num_phi", [0, 4])
def test_a_tokenizer_takes_every_weight_on_another_schedule(num_phi):
    sizes = {"num_phi": num_phi, "patch_nums": (1, 2, 4)}
    given = random_tokenizer(dataclasses.replace(TOKENIZER, **sizes), 0)
    config = dataclasses.replace(given.config, patch_nums=(1, 4))
    made = tokenizer_at(given, config)
    assert made.quantizer.config == made.config == config
    old, new = (quantizer.phi_kernel[...] for quantizer in (given.quantizer, made.quantizer))
    np.testing.assert_array_equal(new, old if num_phi else old[np.array([0, 2])])
    np.testing.assert_array_equal(made.quantizer.codebook[...], given.quantizer.codebook[...])
    np.testing.assert_array_equal(made.analysis[...], given.analysis[...])


def fine_tuning(export, source=None, **change):
    """The config of a tokenizer's training that starts from an export."""
    sizes = {
        name: change.pop(name) for name in ("patch_nums", "vocab_size", "beta") if name in change
    }
    others = {name: change.pop(name) for name in ("data", "export_dtype") if name in change}
    tokenizer = dataclasses.replace(TOKENIZER, **sizes)
    return Config(
        tokenizer=tokenizer, train_tokenizer=TrainTokenizerConfig(steps=3, **change),
        pretrained_tokenizer=export[0] if source is None else source,
        **{"data": DataConfig(size=4 * tokenizer.patch_nums[-1])} | others,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_size": 32}, r"holds a tokenizer with vocab_size=64, but config.* is 32"),
        ({"source": "", "decoder_only": True}, r"decoder_only=True keeps the encoder of a trained"),
        (
            {"decoder_only": True, "patch_nums": (1, 2, 3, 8)},
            r"tokenizer\.patch_nums=\(1, 2, 3, 8\) is another than in .* expected \(1, 2, 4\)",
        ),
        ({"decoder_only": True, "beta": 0.5}, r"tokenizer\.beta=0\.5 is another .* expected 0\.25"),
        ({"data": DataConfig(size=16, tokens="cache")}, r"data\.tokens=cache .*steps=3 change"),
    ],
)
def test_what_no_fine_tuning_can_mean(export, change, sentence):
    with pytest.raises(BadInput, match=sentence):
        check_tokenizer(fine_tuning(export, **change))


def test_what_fine_tuning_may_change(export):
    check_tokenizer(fine_tuning(export, patch_nums=(1, 2, 3, 8)))
    tokens = DataConfig(size=16, tokens="cache")
    check_tokenizer(fine_tuning(export, decoder_only=True, data=tokens))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr_scale": "quantizer=0", "kmeans_steps": 2}, r"=quantizer=0 freezes .*kmeans_steps=2"),
        ({"lr_scale": "quantizer=0.1"}, r"quantizer\.codebook by 0\.1, but .*codebook_decay=0\.99"),
        ({"lr_scale": ".=0"}, r"lr_scale=\.=0 freezes all weights; expected a factor above 0"),
        (
            {"lr_scale": "decoder|post_conv|synthesis=0", "decoder_only": True},
            r"synthesis=0 freezes the decoder, and train_tokenizer\.decoder_only=True all others",
        ),
    ],
)
def test_rates_that_train_nothing(export, change, sentence):
    with pytest.raises(BadInput, match=sentence):
        check_start(fine_tuning(export, **change))


def test_rates_that_train_something(export):
    for change in (
        {"lr_scale": "quantizer=0"},
        {"lr_scale": "quantizer.codebook=1,quantizer=0.1"},
        {"lr_scale": "quantizer=0.1", "codebook_decay": 0.0},
        {"lr_scale": "quantizer=0.1,post_conv=0", "decoder_only": True},
    ):
        check_start(fine_tuning(export, **change))


def test_an_encoder_that_is_kept_is_not_rounded(export):
    tokenizer = random_tokenizer(TOKENIZER, 0)
    change = {"decoder_only": True, "export_dtype": "bfloat16"}
    with pytest.raises(BadInput, match="export_dtype=bfloat16 rounds the weights of"):
        check_rounding(fine_tuning(export, **change), tokenizer)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), tokenizer)
    check_rounding(fine_tuning(export, **change), rounded)
    check_rounding(fine_tuning(export, export_dtype="bfloat16"), tokenizer)
