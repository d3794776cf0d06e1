"""All implementations of attention compute what the plain one computes, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import BadInput
from var_jax.models import backend
from var_jax.models.attention import attention, choose, dense, joined_blocks, prepare
from var_jax.models.attention_tpu import cached, cached_flops, padded_flops, tiles
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512, Pattern
from var_jax.sharding.mesh import BATCH, make_mesh
from var_jax.sharding.ops import reshard

# 295 tokens: two tiles, the second of them unaligned to the scales.
SCALES = Pattern.block_causal((1, 2, 4, 7, 15))
PATTERNS = {
    "scales": SCALES,
    "causal": Pattern((1,) * 295),
    "full": Pattern.full(295),
    "oblong": Pattern.block_causal((1, (1, 2), (3, 5), (9, 7), (11, 19))),  # 290 tokens
    "window": Pattern.block_causal((1, 2, 4, 7, 15), window=2),
    "own scale": Pattern.block_causal((1, 2, 4, 7, 15), window=1),
    "own scale, of one token": Pattern.block_causal((1, 1, 2), window=1),
    "own scale, small and large": Pattern.block_causal((1, 8, 16), window=1),
    "window of small scales": Pattern.block_causal((1, 2, 3, 4, 5, 6, 8, 10), window=3),
}
ALIKE = ("full", "own scale", "window of small scales")  # to others that are tried
HEADS, WIDTH = 3, 64  # an odd number: the last block of lanes is half empty


def results(implementation, qk_norm, batch=1, heads=HEADS, pattern=SCALES, dtype=jnp.float32):
    """The mixed values and the gradients of all five inputs."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (batch, pattern.length, heads, WIDTH)
    q, k, v, weight = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
    q_bias, scale = jax.random.normal(keys[4], (heads, WIDTH)), jnp.linspace(0.5, 3, heads)
    if not qk_norm:
        scale = scale / 8
    if not jax.sharding.get_abstract_mesh().empty:
        q, k, v, weight = reshard((q, k, v, weight), BATCH, None, "tensor")

    def run(q, k, v, q_bias, scale):
        how = {"q_bias": q_bias, "scale": scale, "qk_norm": qk_norm}
        mixed = attention(q, k, v, pattern, implementation=implementation, **how)
        return (mixed * weight).astype(jnp.float32).sum(), mixed

    inputs = (q, k, v, q_bias, scale)
    return jax.jit(jax.value_and_grad(run, argnums=range(5), has_aux=True))(*inputs)


def assert_same(ours, plain, atol=3e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=atol * float(abs(b).max()))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_implementations_agree(qk_norm):
    plain = results("masked", qk_norm)
    assert_same(results("blocks", qk_norm), plain)
    assert_same(results("kernel", qk_norm), plain)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else [])
        for name in PATTERNS
        if name != "scales"
    ],
)
def test_patterns_of_other_models_agree(name):
    plain = results("masked", True, pattern=PATTERNS[name])
    assert_same(results("blocks", True, pattern=PATTERNS[name]), plain)
    assert_same(results("kernel", True, pattern=PATTERNS[name]), plain)


@pytest.mark.parametrize("name", ["scales", "oblong", "window"])
def test_the_kernel_is_lowered_for_tpus(name):
    """Forward and backward, in place of the interpreter that runs it here."""
    pattern = PATTERNS[name]
    q = jax.ShapeDtypeStruct((2, pattern.length, HEADS, WIDTH), jnp.bfloat16)

    def run(q, k, v):
        how = {"scale": jnp.ones(HEADS), "qk_norm": True, "implementation": "kernel"}
        return (attention(q, k, v, pattern, **how).astype(jnp.float32) ** 2).sum()

    with backend.assume("tpu"):
        traced = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2))).trace(q, q, q)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2


@pytest.mark.parametrize("new_tokens", [16, 25, 300])
def test_the_kernel_of_sampling_is_lowered_for_tpus(new_tokens):
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.bfloat16)
    q, kept = shape(2, new_tokens, 4, 64), shape(3, 2, 48, 256)
    query = {"q_bias": jnp.zeros((4, 64)), "scale": jnp.ones(4), "qk_norm": True}
    how = {"kept": 13, "interpret": False, **query}
    run = jax.jit(lambda *arrays: cached(*arrays, jnp.asarray(1), **how))
    with backend.assume("tpu"):
        text = run.trace(q, q, q, kept, kept).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 1


@pytest.mark.parametrize("name", ["scales", "oblong", "window"])
def test_cudnn_gets_what_it_takes(name, cudnn_in_xla):
    plain = results("masked", True, pattern=PATTERNS[name])
    assert_same(results("cudnn", True, pattern=PATTERNS[name]), plain)
    even = 2 * -(-PATTERNS[name].length // 2)
    assert {*cudnn_in_xla} == {(even, even)}


def test_cudnn_splits_over_a_mesh(cudnn_in_xla):
    """Its mask, too, which a run on one GPU has a mesh for as well."""
    plain = results("masked", True, batch=4, heads=4)
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])):
            assert_same(results("cudnn", True, batch=4, heads=4), plain)
    assert {*cudnn_in_xla} == {(296, 296)}


def test_bfloat16_agrees_with_float32():
    plain = results("masked", True)
    for implementation in ("masked", "blocks", "kernel"):
        assert_same(results(implementation, True, dtype=jnp.bfloat16), plain, atol=3e-2)


@pytest.mark.parametrize(
    ("qk_norm", "mesh", "new_tokens", "dtype"),
    [
        (True, None, 17, jnp.float32), (False, None, 17, jnp.float32),
        (True, (2, 2, 2), 17, jnp.float32), (False, (2, 2, 2), 17, jnp.float32),
        (True, None, 300, jnp.float32), (True, None, 17, jnp.bfloat16),
    ],
)  # fmt: skip
def test_cached_attention_in_a_kernel_agrees(qk_norm, mesh, new_tokens, dtype):
    """New tokens, in two tiles if they are 300, and 13 in a cache of 40; the second of 3 layers."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    new = [draw(4, new_tokens, 4, 64).astype(dtype) for _ in "qkv"]
    cache = [draw(3, 4, 40, 256).astype(dtype) for _ in "kv"]
    query = {"q_bias": draw(4, 64), "scale": draw(4) / 8, "qk_norm": qk_norm}
    old_k, old_v = (x[1, :, :13].reshape(4, 13, 4, 64) for x in cache)
    k, v = jnp.concatenate([old_k, new[1]], axis=1), jnp.concatenate([old_v, new[2]], axis=1)
    q, normed = prepare(new[0], k, **query)
    plain = dense(q, normed, v)
    how = {"kept": 13, "interpret": True, **query}
    run = jax.jit(lambda *arrays: cached(*arrays, jnp.asarray(1), **how))
    if mesh is None:
        ours = run(*new, *cache)
    else:
        with jax.set_mesh(make_mesh(*mesh)):
            kept = reshard(tuple(cache), None, BATCH, None, "tensor")
            ours = run(*reshard(tuple(new), BATCH, None, "tensor"), *kept)
    assert_same(ours, plain, atol=3e-5 if dtype == jnp.float32 else 2e-2)


def test_cost_of_cached_attention_is_padded_to_128():
    assert cached_flops(100, 580, 64) == 2 * 2 * 128 * (128 + 640) * 128


def test_masks():
    assert (
        Pattern.block_causal((1, 2)).mask().astype(int).tolist()
        == [[1, 0, 0, 0, 0]] + [[1] * 5] * 4
    )
    np.testing.assert_array_equal(Pattern((1,) * 7).mask(), np.tri(7, dtype=bool))
    assert Pattern.full(3).mask().all()
    window = Pattern.block_causal((1, 2, (1, 2)), window=2)
    assert (
        window.mask().astype(int).tolist()
        == [[1] + [0] * 6] + [[1] * 5 + [0] * 2] * 4 + [[0] + [1] * 6] * 2
    )
    assert window.pairs == window.mask().sum()
    assert (
        Pattern.block_causal((1, 2, 3), window=9).mask().tolist()
        == Pattern.block_causal((1, 2, 3)).mask().tolist()
    )


@pytest.mark.parametrize(("window", "most"), [(0, 424), (1, 0), (2, 169), (3, 269)])
def test_what_a_cache_keeps(window, most):
    """Of 680 tokens: all but the last scale, or those that a later scale sees."""
    pattern = Pattern.block_causal(PATCH_NUMS_256, window)
    assert pattern.room(10) == most
    assert pattern.room(1) == pattern.left(9) == pattern.left(-1) == 0
    first = [pattern.left(k) for k in range(3)]
    assert first == {0: [1, 5, 14], 1: [0, 0, 0], 2: [1, 4, 9], 3: [1, 5, 13]}[window]


@pytest.mark.slow
def test_the_kernel_splits_over_a_mesh():
    plain = results("masked", True, batch=4, heads=4)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert_same(jax.device_get(results("kernel", True, batch=4, heads=4)), plain)


@pytest.mark.parametrize(
    "pattern",
    [*map(Pattern.block_causal, (PATCH_NUMS_256, PATCH_NUMS_512, (1,))), *PATTERNS.values()],
)
def test_tiles_cover_what_may_be_seen(pattern):
    found, mask = tiles(pattern), pattern.mask()
    rows = [row for tile, _ in found for row in range(tile.start, tile.stop)]
    assert rows == list(range(pattern.length))
    for tile, keys in found:
        assert tile.start % 8 == 0 and tile.stop - tile.start <= 256
        seen = np.flatnonzero(mask[tile].any(axis=0))
        assert keys.stop == seen[-1] + 1
        assert keys.start % 16 == 0 and 0 <= seen[0] - keys.start < 16


def test_what_the_kernel_is_charged():
    # By hand: rows 248, 176, 256 -> 256 each; keys 255, 424, 680 -> 256, 512, 768; width 64 -> 128.
    area = 256 * (256 + 512 + 768)
    pattern = Pattern.block_causal(PATCH_NUMS_256)
    assert padded_flops(pattern, 64, backward=False) == 2 * 2 * area * 128
    assert padded_flops(pattern, 64, backward=True) == 5 * 2 * area * 128
    # Two scales: keys from 91 (80), 155 (144), 255 (240) on.
    window = Pattern.block_causal(PATCH_NUMS_256, window=2)
    area = 256 * (256 + 384 + 512)
    assert padded_flops(window, 64, backward=False) == 2 * 2 * area * 128


def test_an_unknown_implementation():
    x = jnp.zeros((1, 5, 1, 64))
    with pytest.raises(BadInput, match="'flash' is not one of auto, masked"):
        attention(x, x, x, Pattern((1,) * 5), implementation="flash")


def test_small_scales_are_joined():
    stops = lambda p: [s.stop for s in joined_blocks(Pattern.block_causal(p))]
    assert stops(PATCH_NUMS_256) == [91, 155, 255, 424, 680]
    assert stops((1, 1, 2, 2, 4, 4, 4, 4, 4)) == [90]  # what is left after 64 is too few
    assert stops((1,)) == [1]


@pytest.mark.parametrize("implementation", ["masked", "blocks", "kernel", "auto"])
def test_another_length_than_the_patterns_is_refused(implementation):
    q = jnp.zeros((1, 5, 2, 64))
    with pytest.raises(ValueError, match="5 tokens; the pattern is of 4"):
        attention(q, q, q, Pattern((1,) * 4), implementation=implementation)


@pytest.mark.parametrize(
    "capability, dtype, width, chosen",
    [
        ("9.0", jnp.bfloat16, 64, "cudnn"),
        ("10.0", jnp.bfloat16, 64, "cudnn"),
        ("8.0", jnp.bfloat16, 128, "cudnn"),
        ("7.5", jnp.bfloat16, 64, "blocks"),  # a T4
        ("gfx90a", jnp.bfloat16, 64, "blocks"),  # of AMD
        ("9.0", jnp.float32, 64, "blocks"),
        ("9.0", jnp.bfloat16, 60, "blocks"),
        ("9.0", jnp.bfloat16, 136, "blocks"),
    ],
)
def test_cudnn_is_chosen_where_it_runs(monkeypatch, capability, dtype, width, chosen):
    class Gpu:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    with backend.assume("cuda"):
        assert choose(dtype, width) == chosen
