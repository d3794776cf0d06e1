"""Sizes read from the names and shapes of a state dict, and what does not fit them."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from golden_cases import CASES, FOLDER, load

from var_jax import BadInput
from var_jax.checkpoints.torch.names import buffers, check, from_torch, leaves, theirs
from var_jax.checkpoints.torch.sizes import tokenizer_config, transformer_config
from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.schedule import PATCH_NUMS_512


def nothing(shape, dtype=np.float32):
    """A tensor that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def abstract(config):
    build = Tokenizer if isinstance(config, TokenizerConfig) else Transformer
    return jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def state(config):
    """Names and shapes of all that the release saves for a config."""
    model = abstract(config)
    weights = {
        name: nothing(theirs(path, nothing(shape)).shape)
        for path, _, names, shape in leaves(model)
        for name in names
    }
    return weights | buffers(model)


SMALL = TransformerConfig(
    patch_nums=(1, 2, 4), vocab_size=48, latent_dim=16, num_classes=7, depth=2, width=96,
    num_heads=6, mlp_ratio=3.0, drop_path=0.1 * 2 / 24,
)  # fmt: skip


@pytest.mark.parametrize("depth", [16, 36])
def test_official_transformers(depth):
    config = TransformerConfig.from_depth(depth)
    assert transformer_config(state(config), None) == config
    without = {name: t for name, t in state(config).items() if name != "lvl_1L"}
    assert transformer_config(without, None) == config  # 680 or 2240 tokens


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TokenizerConfig(), marks=pytest.mark.slow),
        TokenizerConfig(channels=64, channel_mults=(1, 3), num_res_blocks=1, vocab_size=100),
        TokenizerConfig(channels=32, channel_mults=(1,), num_phi=0, codebook_znorm=True),
        TokenizerConfig(channels=32, channel_mults=(1,), num_phi=1, latent_dim=8),
        TokenizerConfig(channels=32, channel_mults=(1,), num_phi=5),
    ],
)
def test_tokenizers(config):
    assert tokenizer_config(state(config), None, config.codebook_znorm) == config


def test_the_schedule_is_read_from_the_file():
    assert transformer_config(state(SMALL), None) == SMALL
    without = {name: t for name, t in state(SMALL).items() if name != "lvl_1L"}
    assert transformer_config(without, (1, 2, 4)) == SMALL
    with pytest.raises(BadInput, match=r"3 scales with 21 tokens in all: give --patch_nums"):
        transformer_config(without, None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case):
    c = json.loads(str(load(case)["config"]))
    shapes = json.loads((FOLDER / f"{case}.shapes.json").read_text())
    kinds = {part: {n: nothing(tuple(s)) for n, s in shapes[part]} for part in shapes}
    sides = tuple(c["patch_nums"])
    tokenizer = tokenizer_config(kinds["tokenizer"], sides, c["codebook_znorm"])
    assert (tokenizer.num_phi, tokenizer.channels) == (c["num_phi"], c["ch"])
    check(abstract(tokenizer), kinds["tokenizer"])
    heads = None if c["qk_l2_norm"] else c["num_heads"]
    transformer = transformer_config(kinds["transformer"], sides, heads)
    for name in ("depth", "width", "num_heads", "num_classes", "vocab_size", "shared_adaln"):
        assert getattr(transformer, name) == c[name]
    check(abstract(transformer), kinds["transformer"])


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("head.bias", None, "tensor 'head.bias' is missing"),
        ("blocks.1.ffn.fc2.bias", None, "tensor 'blocks.1.ffn.fc2.bias' is missing"),
        ("blocks.7.ffn.fc2.bias", nothing((96,)), "'blocks.2.*' is missing"),
        ("extra", nothing((3,)), "tensor 'extra' is surplus"),
        ("head.bias", nothing((47,)), r"'head.bias' has shape \(47,\), expected \(48,\)"),
        ("head.bias", nothing((48,), np.int64), "'head.bias' holds int64, expected floats"),
        ("head.bias", np.full(48, np.nan), "'head.bias' holds values that are not finite"),
        ("class_emb.weight", nothing((0, 96)), r"has shape \(0, 96\), expected 2 axes, none"),
        ("blocks.0.attn.zero_k_bias", np.ones(96, np.float32), "is not zero"),
        ("pos_1LC", nothing((1, 30, 96)), "make 21 tokens in 3 scales, but 'pos_1LC' has 30"),
        ("word_embed.weight", None, "expects the weights of a transformer"),
        ("encoder.conv_in.weight", nothing((1,)), "'encoder.conv_in.weight' is surplus"),
    ],
)
def test_wrong_tensors(name, value, sentence):
    tensors = {n: t for n, t in (state(SMALL) | {name: value}).items() if t is not None}
    with pytest.raises(BadInput, match=sentence):
        from_torch(abstract(transformer_config(tensors, (1, 2, 4))), tensors)


def test_flags_that_contradict_the_file():
    tensors = state(SMALL)
    with pytest.raises(BadInput, match=r"--num_heads=4, but .* is of 6 heads"):
        transformer_config(tensors, None, 4)
    with pytest.raises(BadInput, match=r"patch_nums=\(1, 2, 3\) make 14 tokens in 3 scales, but"):
        transformer_config(tensors, (1, 2, 3))


def test_tokenizers_that_need_a_flag():
    small = dict(channel_mults=(1,), num_res_blocks=1)
    config = TokenizerConfig(channels=32, patch_nums=(1, 2, 4), num_phi=0, **small)
    tensors = state(config)
    assert tokenizer_config(tensors, (1, 2, 4)) == config
    with pytest.raises(BadInput, match="has 3 scales; give their sides as --patch_nums"):
        tokenizer_config(tensors, None)
    with pytest.raises(BadInput, match="each for one scale, do not fit the 10 scales"):
        tokenizer_config(tensors, PATCH_NUMS_512)
    with pytest.raises(BadInput, match="norm_groups=32 does not divide the 48 channels"):
        tokenizer_config(state(TokenizerConfig(channels=48, norm_groups=16, **small)), None)
