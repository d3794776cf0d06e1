"""All implementations of attention compute what the plain one computes, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import BadInput
from var_jax.models.attention import attention, blocks
from var_jax.models.attention_tpu import padded_flops, tiles
from var_jax.schedule import PATCH_NUMS_256, PATCH_NUMS_512, num_tokens, slices
from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.ops import BATCH, pin

SIDES = (1, 2, 4, 7, 15)  # 295 tokens: two tiles, the second of them unaligned to the scales
HEADS, WIDTH = 3, 64  # an odd number: the last block of lanes is half empty


def results(implementation, qk_norm, batch=1, heads=HEADS):
    """The mixed values and the gradients of all five inputs."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (batch, num_tokens(SIDES), heads, WIDTH)
    q, k, v, weight = (jax.random.normal(key, shape) for key in keys[:4])
    q_bias, scale = jax.random.normal(keys[4], (heads, WIDTH)), jnp.linspace(0.5, 3, heads)
    if not qk_norm:
        scale = scale / 8
    if not jax.sharding.get_abstract_mesh().empty:
        q, k, v, weight = (pin(x, BATCH, None, "tensor") for x in (q, k, v, weight))

    def run(q, k, v, q_bias, scale):
        how = {"q_bias": q_bias, "scale": scale, "qk_norm": qk_norm}
        mixed = attention(q, k, v, SIDES, implementation=implementation, **how)
        return (mixed * weight).sum(), mixed

    inputs = (q, k, v, q_bias, scale)
    return jax.jit(jax.value_and_grad(run, argnums=range(5), has_aux=True))(*inputs)


def assert_same(ours, plain):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_implementations_agree(qk_norm):
    plain = results("masked", qk_norm)
    assert_same(results("blocks", qk_norm), plain)
    assert_same(results("kernel", qk_norm), plain)


def test_the_kernel_splits_over_a_mesh():
    plain = results("masked", True, batch=4, heads=4)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert_same(jax.device_get(results("kernel", True, batch=4, heads=4)), plain)


@pytest.mark.parametrize("sides", [PATCH_NUMS_256, PATCH_NUMS_512, SIDES, (1,)])
def test_tiles_cover_what_may_be_seen(sides):
    found = tiles(sides)
    rows = [row for start, stop, _ in found for row in range(start, stop)]
    assert rows == list(range(num_tokens(sides)))
    for start, stop, keys in found:
        assert start % 8 == 0 and stop - start <= 256
        assert keys == next(s.stop for s in slices(sides) if s.stop >= stop)


def test_what_the_kernel_is_charged():
    # By hand: rows 248, 176, 256 -> 256 each; keys 255, 424, 680 -> 256, 512, 768; width 64 -> 128.
    area = 256 * (256 + 512 + 768)
    assert padded_flops(PATCH_NUMS_256, 64, backward=False) == 2 * 2 * area * 128
    assert padded_flops(PATCH_NUMS_256, 64, backward=True) == 5 * 2 * area * 128


def test_an_unknown_implementation():
    x = jnp.zeros((1, 5, 1, 64))
    with pytest.raises(BadInput, match="'flash' is not one of auto, masked"):
        attention(x, x, x, (1, 2), implementation="flash")


def test_small_scales_are_joined():
    ends = lambda patch_nums: [block.stop for block in blocks(patch_nums)]
    assert ends(PATCH_NUMS_256) == [91, 155, 255, 424, 680]
    assert ends((1, 1, 2, 2, 4, 4, 4, 4, 4)) == [90]  # what is left after 64 is too few
    assert ends((1,)) == [1]
