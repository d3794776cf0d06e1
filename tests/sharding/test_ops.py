"""Products and their gradients, alone and on a mesh."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import pytest

from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.ops import in_parts, pin, project

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
        x_MD, w_DF = pin(x, ("data", "fsdp"), x_axis), pin(w, *w_spec)
        grads = jax.jit(jax.grad(lambda x, w: (project(x, w, out) * g).sum(), (0, 1)))
        made = grads(x_MD, w_DF)
        assert not mesh_shape or made[1].sharding == w_DF.sharding
        got = jax.device_get(made)
    chex.assert_trees_all_close(got, (g @ w.T, x.T @ g), rtol=1e-5, atol=1e-5)


def test_a_product_keeps_each_dtype():
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16)
    loss = lambda x, w: project(x, w, dtype=jnp.float32).sum()
    assert project(x, w, dtype=jnp.float32).dtype == jnp.float32
    assert [g.dtype for g in jax.grad(loss, (0, 1))(x, w)] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(
    "mesh_shape, most, fewest, rows",
    [(None, 8, 1, 8), (None, 5, 1, 4), (None, 16, 1, 16), (None, 16, 2, 8), (None, 16, 99, 1),
     ((2, 2, 2), 3, 1, 8)],
)  # fmt: skip
def test_rows_in_parts_keep_their_order(mesh_shape, most, fewest, rows):
    x, seen = jnp.arange(32.0).reshape(16, 2), []

    def f(x):
        seen.append(x.shape[0])
        return x.sum(-1)

    with jax.set_mesh(make_mesh(*mesh_shape)) if mesh_shape else contextlib.nullcontext():
        got = jax.jit(lambda x: in_parts(f, x, most, fewest))(pin(x, ("data", "fsdp")))
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(x.sum(-1)))
    assert set(seen) == {rows}
