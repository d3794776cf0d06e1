"""Winograd's convolution is the plain one, and so are its gradients."""

import contextlib

import chex
import jax
import pytest

from var_jax.infra.mesh import make_mesh
from var_jax.models import winograd
from var_jax.models.partition import pin


def example(shape=(8, 32, 40), channels=(5, 7), key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    x = jax.random.normal(keys[0], (*shape, channels[0]))
    kernel = jax.random.normal(keys[1], (3, 3, *channels))
    return x, kernel, jax.random.normal(keys[2], (*shape, channels[1]))


@pytest.mark.parametrize("mesh_shape", [None, (4, 2, 1)])
def test_values_and_gradients(mesh_shape):
    x, kernel, weight = example()
    run = lambda f: lambda x, kernel: (f(x, kernel) * weight).sum()
    wanted = jax.jit(jax.value_and_grad(run(winograd.plain), (0, 1)))(x, kernel)
    with jax.set_mesh(make_mesh(*mesh_shape)) if mesh_shape else contextlib.nullcontext():
        got = jax.jit(winograd.winograd)(pin(x, ("data", "fsdp")), pin(kernel))
        chex.assert_trees_all_close(
            jax.device_get(got), winograd.plain(x, kernel), rtol=1e-5, atol=1e-4
        )
        grads = jax.jit(jax.value_and_grad(run(winograd.winograd), (0, 1)))
        got = jax.device_get(grads(pin(x, ("data", "fsdp")), pin(kernel)))
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change, used",
    [({}, True), ({"strides": (2, 2)}, False), ({"padding": "VALID"}, False)],
)
def test_only_what_it_can_do_is_given_to_it(change, used, monkeypatch):
    monkeypatch.setattr(winograd, "winograd", lambda x, kernel: "winograd")
    x, kernel, _ = example((1, 32, 32), (128, 128))
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    how = {"strides": (1, 1), "padding": "SAME"} | change
    assert isinstance(winograd.convolve(x, kernel, **how, **layout), str) == used
    for odd in (x[:, :, :31], x[:, :15], x[..., :64]):
        narrow = kernel[:, :, : odd.shape[-1]]
        assert not isinstance(winograd.convolve(odd, narrow, **how, **layout), str)
