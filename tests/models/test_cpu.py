"""Winograd's convolution is the plain one, and so are its gradients."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from var_jax.models import backend, cpu
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
    wanted = jax.jit(jax.value_and_grad(run(cpu.plain), (0, 1)))(x, kernel)
    with jax.set_mesh(make_mesh(*mesh_shape)) if mesh_shape else contextlib.nullcontext():
        winograd = lambda x, kernel: data_parallel(lambda k, x: cpu.winograd(x, k))(kernel, x)
        inputs = reshard(x, ("data", "fsdp")), reshard(kernel)
        got = jax.device_get(jax.jit(winograd)(*inputs))
        chex.assert_trees_all_close(got, cpu.plain(x, kernel), rtol=1e-5, atol=1e-4)
        got = jax.device_get(jax.jit(jax.value_and_grad(run(winograd), (0, 1)))(*inputs))
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-3)


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
    monkeypatch.setattr(cpu, "winograd", lambda x, kernel: 0 * cpu.plain(x, kernel) + 1)
    chex.assert_trees_all_close(layer(x), jnp.ones_like(plain) + layer.bias[...][None, None, None])
