"""Products and their gradients, alone and on a mesh."""

import contextlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.ops import data_parallel, in_parts, project, reshard
from var_jax.tools.tpu_cost import Program

LAYOUTS = [  # of w; of x @ w
    ((None, "tensor"), "tensor"), (("tensor", None), None), ((None, None), None),
    ((None, None), "tensor"), (("fsdp", None), None), (("fsdp", None), "tensor"),
    (("fsdp", "tensor"), "tensor"), (("tensor", "fsdp"), None),
]  # fmt: skip


@pytest.mark.parametrize("mesh_shape", [None, (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("w_spec, out", LAYOUTS)
@pytest.mark.parametrize("D, F", [(8, 16), (16, 8)])  # both orders of the weight gradient
def test_gradients_of_a_product(D, F, w_spec, out, mesh_shape):
    shapes = [(16, D), (D, F), (16, F)]
    x, w, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    with jax.set_mesh(make_mesh(*mesh_shape)) if mesh_shape else contextlib.nullcontext():
        x_axis = "tensor" if w_spec[0] == "tensor" else None
        x_MD, w_DF = reshard(x, ("data", "fsdp"), x_axis), reshard(w, *w_spec)
        grads = jax.jit(jax.grad(lambda x, w: (project(x, w, out) * g).sum(), (0, 1)))
        results = grads(x_MD, w_DF)
        assert not mesh_shape or results[1].sharding == w_DF.sharding
        got = jax.device_get(results)
    chex.assert_trees_all_close(got, (g @ w.T, x.T @ g), rtol=1e-5, atol=1e-5)


def test_a_product_keeps_each_dtype():
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16)
    loss = lambda x, w: project(x, w, dtype=jnp.float32).sum()
    assert project(x, w, dtype=jnp.float32).dtype == jnp.float32
    assert [g.dtype for g in jax.grad(loss, (0, 1))(x, w)] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(
    "most, whole, rows",
    [
        (8, False, 8), (5, False, 4), (16, False, 16), (11, False, 8),
        (8, True, 8), (5, True, 5), (16, True, 16), (11, True, 11), (99, True, 16),
    ],
)  # fmt: skip
def test_rows_in_parts_keep_their_order(most, whole, rows):
    x, seen = jnp.arange(32.0).reshape(16, 2), []

    def f(x):
        seen.append(x.shape[0])
        return {"sum": x.sum(-1), "whole": (x > 3).astype(jnp.int32)}

    got = jax.jit(lambda x: in_parts(f, x, most, whole))(x)
    chex.assert_trees_all_equal(got, {"sum": x.sum(-1), "whole": (x > 3).astype(jnp.int32)})
    assert set(seen) == {rows}


def test_a_prime_number_of_rows_is_padded_and_not_taken_one_by_one():
    x, seen = jnp.arange(11.0), []
    got = in_parts(lambda x: seen.append(len(x)) or 2 * x, x, 8)
    chex.assert_trees_all_equal(got, 2 * x)
    assert set(seen) == {6}


def test_a_single_part_stays_in_a_loop_on_every_device():
    x = jnp.arange(16.0)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        f = jax.jit(data_parallel(lambda w, x: in_parts(lambda x: w * jnp.sin(x), x, 8, True)))
        args = 2.0, reshard(x, ("data", "fsdp"))
        np.testing.assert_allclose(f(*args), 2 * jnp.sin(x), rtol=1e-6)
        program = f.lower(*args).compile().as_text()
    body = re.search(r" while\(.*body=%?([\w.\-]+)", program)
    assert body and "sine" in {op.kind for op in Program(program).ops(True, body[1])}


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2)])
def test_single_device_code_runs_in_parallel_with_the_same_gradients(mesh_shape):
    x, w = jax.random.normal(jax.random.key(0), (16, 3, 4)), jnp.linspace(-1.0, 1.0, 4)

    def f(w, x):  # reshapes and look-ups as they please
        flat = x.reshape(len(x), -1)
        return {"sum": (x * w[None, None]).sum((1, 2)), "first": flat[:, :2]}

    loss = lambda w, x: (data_parallel(f)(w, x)["sum"] ** 2).mean()
    wanted = f(w, x), jax.grad(loss)(w, x)
    with jax.set_mesh(make_mesh(*mesh_shape)):
        got = jax.jit(data_parallel(f))(w, x), jax.jit(jax.grad(loss))(w, x)
        got = jax.device_get(got)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)
