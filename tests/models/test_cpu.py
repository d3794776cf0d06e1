"""The convolutions of CPUs are XLA's, and so are their gradients."""

import contextlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from var_jax.models import backend, cpu
from var_jax.models.discriminator import SpectralConv
from var_jax.models.tokenizer import conv
from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.ops import data_parallel, reshard


def example(shape=(8, 32, 40), channels=(5, 7), key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    x = jax.random.normal(keys[0], (*shape, channels[0]))
    kernel = jax.random.normal(keys[1], (3, 3, *channels))
    return x, kernel, jax.random.normal(keys[2], (*shape, channels[1]))


@pytest.mark.parametrize("mesh_shape", [None, (4, 2, 1)])
def test_values_and_gradients(mesh_shape):
    x, kernel, weight = example()
    run = lambda f: lambda x, kernel: (f(x, kernel) * weight).sum()
    plain = lambda x, kernel: cpu.by_xla(x, kernel, (1, 1), "SAME")
    wanted = jax.jit(jax.value_and_grad(run(plain), (0, 1)))(x, kernel)
    with jax.set_mesh(make_mesh(*mesh_shape)) if mesh_shape else contextlib.nullcontext():
        winograd = lambda x, kernel: data_parallel(lambda k, x: cpu.winograd(x, k))(kernel, x)
        inputs = reshard(x, ("data", "fsdp")), reshard(kernel)
        got = jax.device_get(jax.jit(winograd)(*inputs))
        chex.assert_trees_all_close(got, plain(x, kernel), rtol=1e-5, atol=1e-4)
        got = jax.device_get(jax.jit(jax.value_and_grad(run(winograd), (0, 1)))(*inputs))
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "size, strides, pad",
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((4, 4), (2, 2), ((1, 1), (1, 1))),  # of 9 columns the last is not read
        ((4, 4), (4, 4), ((0, 0), (0, 0))),
        ((3, 3), (2, 2), ((0, 1), (0, 1))),
        ((1, 1), (1, 1), ((0, 0), (0, 0))),
        ((2, 5), (3, 1), ((0, 2), (3, 0))),
    ],
)
def test_gradients_are_those_of_xla(size, strides, pad):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 8, 9, 3))
    kernel = jax.random.normal(keys[1], (*size, 3, 5))
    run = lambda f: jax.value_and_grad(
        lambda *inputs: (f(*inputs, strides, pad) ** 2).sum(), (0, 1)
    )
    wanted, got = run(cpu.by_xla)(x, kernel), run(cpu.convolve)(x, kernel)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-3)


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize(
    "options, taken",
    [
        (NHWC, True),
        (NHWC | {"lhs_dilation": [1, 1], "feature_group_count": 1, "out_sharding": None}, True),
        (NHWC | {"padding": "VALID"}, True),
        (NHWC | {"padding": ((2, 0), (0, 1)), "window_strides": (1, 2)}, True),
        (NHWC | {"rhs_dilation": (2, 2)}, False),
        (
            NHWC | {"lhs_dilation": (1, 2), "window_strides": (1, 1), "padding": ((0, 0), (1, 1))},
            False,
        ),
        (NHWC | {"dtype": jnp.bfloat16}, False),
    ],
)
def test_convolutions_of_all_kinds_are_those_of_xla(options, taken, monkeypatch):
    options, calls = dict(options), []
    dtype = options.pop("dtype", jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 9, 9, 4), dtype)
    kernel = jax.random.normal(keys[1], (3, 3, 4, 6), dtype)
    strides, padding = options.pop("window_strides", (2, 2)), options.pop("padding", "SAME")
    convolve = cpu.convolve
    monkeypatch.setattr(cpu, "convolve", lambda *args: calls.append(args) or convolve(*args))
    loss = lambda x, kernel, run: (run(x, kernel, strides, padding, **options) ** 2).sum()
    wanted, got = (
        jax.value_and_grad(loss, (0, 1))(x, kernel, run)
        for run in (jax.lax.conv_general_dilated, backend.convolve)
    )
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert bool(calls) == taken


@pytest.mark.parametrize(
    "options",
    [
        NHWC | {"feature_group_count": 2},
        NHWC | {"batch_group_count": 2},
        NHWC | {"preferred_element_type": jnp.bfloat16},
        {"dimension_numbers": ("NCHW", "HWIO", "NCHW")},
        {},  # which is NCHW
    ],
)
def test_what_has_other_options_is_left_to_xla(options):
    assert not cpu.is_plain(jnp.zeros((2, 4, 4, 4)), jnp.zeros((3, 3, 4, 6)), **options)


SPECTRAL = SpectralConv(8, 16, 9, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "layer, shape",
    [(conv(8, 16, 4, nnx.Rngs(0), strides=2), (2, 16, 16, 8)), (SPECTRAL, (2, 16, 8))],
)
def test_gradients_have_the_layout_that_is_fast_in_branches(layer, shape):
    """In another, XLA's CPU runs a loop over single numbers; outside of branches it rewrites it."""
    x = jnp.ones(shape)
    gradient = jax.grad(lambda layer, x: (layer(x) ** 2).sum(), (0, 1))
    nothing = lambda layer, x: jax.tree.map(jnp.zeros_like, (layer, x))
    branch = jax.jit(lambda flag, *inputs: jax.lax.cond(flag, gradient, nothing, *inputs))
    program = branch.lower(True, layer, x).compile().as_text()
    layouts = re.findall(r" convolution\(.*dim_labels=(\S+?)[,\n]", program)
    assert len(layouts) == 3 and {*layouts} == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    "change, used",
    [
        ({}, True),
        ({"shape": (1, 24, 64, 128)}, False),
        ({"shape": (1, 32, 65, 128)}, False),
        ({"shape": (1, 32, 62, 128)}, False),
        ({"shape": (1, 32, 64, 64)}, False),
        ({"kernel": (1, 1, 128, 128)}, False),
        ({"kernel": (3, 3, 128, 64)}, False),
        ({"dtype": "bfloat16"}, False),
        ({"strides": (2, 2)}, False),
        ({"padding": ((0, 1), (0, 1))}, False),
        ({"platform": "tpu"}, False),
    ],
)
def test_only_what_gains_is_given_to_it(change, used, monkeypatch):
    shape = (1, 1, 1, change.get("kernel", (128,))[-1])
    monkeypatch.setattr(backend, "platform", lambda: change.get("platform", "cpu"))
    monkeypatch.setattr(cpu, "winograd", lambda x, kernel: jnp.ones(shape))
    monkeypatch.setattr(cpu, "convolve", lambda *args: jnp.zeros(shape))
    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda *args, **how: jnp.zeros(shape))
    x = jnp.zeros(change.get("shape", (1, 32, 64, 128)), change.get("dtype", "float32"))
    kernel = jnp.zeros(change.get("kernel", (3, 3, x.shape[-1], 128)))
    how = {"strides": (1, 1), "padding": "SAME"}
    how |= {name: change[name] for name in how if name in change}
    assert backend.convolve(x, kernel, **how).all() == used


@pytest.mark.slow
def test_the_tokenizer_uses_it(monkeypatch):
    layer = conv(128, 128, 3, nnx.Rngs(0))
    x = example((1, 32, 64), (128, 1))[0]
    plain = layer(x)
    monkeypatch.setattr(cpu, "winograd", lambda x, kernel: 0 * plain + 1)
    chex.assert_trees_all_close(layer(x), jnp.ones_like(plain) + layer.bias[...][None, None, None])
