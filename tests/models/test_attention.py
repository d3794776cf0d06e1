"""All implementations of attention compute what the plain one computes, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import BadInput
from var_jax.models.attention import Pattern, attention, cached, joined_blocks, prepare
from var_jax.models.attention_tpu import cached_flops, padded_flops, tiles
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512
from var_jax.sharding.mesh import BATCH, make_mesh
from var_jax.sharding.ops import reshard

# 295 tokens: two tiles, the second of them unaligned to the scales.
SCALES = Pattern.block_causal((1, 2, 4, 7, 15))
PATTERNS = {
    "scales": SCALES,
    "causal": Pattern.causal(295),
    "full": Pattern.full(295),
    "oblong": Pattern.block_causal((1, (1, 2), (3, 5), (9, 7), (11, 19))),  # 290 tokens
}
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


@pytest.mark.parametrize("name", ["causal", "full", "oblong"])
def test_patterns_of_other_models_agree(name):
    plain = results("masked", True, pattern=PATTERNS[name])
    assert_same(results("blocks", True, pattern=PATTERNS[name]), plain)
    assert_same(results("kernel", True, pattern=PATTERNS[name]), plain)


def test_bfloat16_agrees_with_float32():
    plain = results("masked", True)
    for implementation in ("masked", "blocks", "kernel"):
        assert_same(results(implementation, True, dtype=jnp.bfloat16), plain, atol=3e-2)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_cached_attention_in_a_kernel_agrees(qk_norm, mesh):
    """The last 17 of 30 tokens in a cache of 40, in the second of three layers."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = draw(4, 40, 4, 64), draw(3, 4, 40, 4, 64), draw(3, 4, 40, 256)
    query = {"q_bias": draw(4, 64), "scale": draw(4) / 8, "qk_norm": qk_norm}
    merged, layer, normed = k.reshape(v.shape), jnp.asarray(1), prepare(q, k[1], **query)
    normed_keys, q = merged.at[1].set(normed[1].reshape(4, 40, 256)), q[:, :17]
    plain = cached(normed[0][:, :17], normed_keys, v, layer, 30)
    run = jax.jit(lambda q, k, v: cached(q, k, v, layer, 30, kernel=True, **query))
    if mesh is None:
        ours = run(q, merged, v)
    else:
        with jax.set_mesh(make_mesh(*mesh)):
            kept = reshard((merged, v), None, BATCH, None, "tensor")
            ours = run(reshard(q, BATCH, None, "tensor"), *kept)
    assert_same(ours, plain)


def test_cost_of_cached_attention_is_padded_to_128():
    assert cached_flops(100, 680, 64) == 2 * 2 * 128 * 768 * 128


def test_masks():
    assert (
        Pattern.block_causal((1, 2)).mask().astype(int).tolist()
        == [[1, 0, 0, 0, 0]] + [[1] * 5] * 4
    )
    np.testing.assert_array_equal(Pattern.causal(7).mask(), np.tri(7, dtype=bool))
    assert Pattern.full(3).mask().all()


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
    found = tiles(pattern.blocks)
    rows = [row for start, stop, _ in found for row in range(start, stop)]
    assert rows == list(range(pattern.length))
    for start, stop, keys in found:
        assert start % 8 == 0 and stop - start <= 256
        assert keys == next(end for end in pattern.ends if end >= stop)


def test_what_the_kernel_is_charged():
    # By hand: rows 248, 176, 256 -> 256 each; keys 255, 424, 680 -> 256, 512, 768; width 64 -> 128.
    area = 256 * (256 + 512 + 768)
    blocks = Pattern.block_causal(PATCH_NUMS_256).blocks
    assert padded_flops(blocks, 64, backward=False) == 2 * 2 * area * 128
    assert padded_flops(blocks, 64, backward=True) == 5 * 2 * area * 128


def test_an_unknown_implementation():
    x = jnp.zeros((1, 5, 1, 64))
    with pytest.raises(BadInput, match="'flash' is not one of auto, masked"):
        attention(x, x, x, Pattern.causal(5), implementation="flash")


def test_small_scales_are_joined():
    stops = lambda p: [s.stop for s in joined_blocks(Pattern.block_causal(p))]
    assert stops(PATCH_NUMS_256) == [91, 155, 255, 424, 680]
    assert stops((1, 1, 2, 2, 4, 4, 4, 4, 4)) == [90]  # what is left after 64 is too few
    assert stops((1,)) == [1]


@pytest.mark.parametrize("implementation", ["masked", "blocks", "kernel", "auto"])
def test_another_length_than_the_patterns_is_refused(implementation):
    q = jnp.zeros((1, 5, 2, 64))
    with pytest.raises(ValueError, match="5 tokens; the pattern is of 4"):
        attention(q, q, q, Pattern.causal(4), implementation=implementation)
