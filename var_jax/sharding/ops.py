"""How model code speaks about the mesh ('data', 'fsdp', 'tensor'), and runs as well without one.

Axes are explicit: an array's type says how it is split, and the helpers here are the only places
where that changes. Outside `jax.set_mesh` each of them is the plain operation.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from var_jax.sharding.mesh import BATCH

T = TypeVar("T")
Axes = str | tuple[str, ...] | None


def on_mesh() -> bool:
    """Whether code is being traced under a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def round_up(count: int) -> int:
    """The smallest batch of at least `count` that the mesh splits evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    shares = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // shares) * shares


def reshard(x: T, *spec: Axes) -> T:
    """Arrays sharded by `spec`, one entry for each leading axis (the rest are not split)."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*spec)), x) if on_mesh() else x


def einsum(equation: str, x: Array, w: Array, *spec: Axes, **kwargs) -> Array:
    """`jnp.einsum` with the result sharded by `spec`."""
    out = P(*spec) if on_mesh() else None
    return jnp.einsum(equation, x, w, out_sharding=out, **kwargs)


def flatten_tokens(x: Float[Array, "B L D"]) -> Float[Array, "M D"]:
    """All tokens of all images in one axis, as matrix products want them."""
    shape = (x.shape[0] * x.shape[1], x.shape[2])
    if not on_mesh():
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=P(BATCH, jax.typeof(x).sharding.spec[2]))


def unflatten_tokens(x: Float[Array, "M D"], batch: int) -> Float[Array, "B L D"]:
    """The inverse of `flatten_tokens`."""
    shape = (batch, x.shape[0] // batch, x.shape[1])
    if not on_mesh():
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=P(BATCH, None, jax.typeof(x).sharding.spec[1]))


def project(
    x_MD: Float[Array, "M D"],
    w_DF: Float[Array, "D F"],
    out: Axes = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "M F"]:
    """x @ w, split over `out`, accumulated and returned in `dtype`.

    `w` is gathered from its 'fsdp' shards; its gradient leaves as a reduce-scatter to them, which
    the compiler would make an all-reduce of all of it (ZeRO, arXiv 1910.02054, §5). Shares of it
    are added up over 'fsdp' in `dtype`, or else in w's, and over 'data' in float32. An axis of `w`
    on 'fsdp' must not be on 'tensor' in x or the result.
    """
    return product(x_MD, w_DF, out, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Array, w: Array, out: Axes, dtype: DTypeLike | None) -> Array:
    """`project`; apart, because type checkers know nothing of what custom_vjp returns."""
    return matmul(x, gather_fsdp(w), P(BATCH, out), dtype)


def product_forward(x: Array, w: Array, out: Axes, dtype: DTypeLike | None):
    return product(x, w, out, dtype), (x, w)


def product_backward(out: Axes, dtype: DTypeLike | None, kept: tuple[Array, Array], g: Array):
    """The gradients of x and w, sharded as they are."""
    x, w = kept
    g = g.astype(x.dtype)  # of the float32 logits; TPUs would round it all the same
    share = lambda x, g: jnp.matmul(x.T, g, preferred_element_type=dtype or w.dtype)
    if not on_mesh():
        return jnp.matmul(g, w.T).astype(x.dtype), share(x, g).astype(w.dtype)
    x_spec, w_spec, g_spec = (jax.typeof(a).sharding.spec for a in (x, w, g))
    # What 'tensor' splits of x and g it splits of dw, whether or not w was split so.
    dw_spec = [
        "fsdp" if kept == "fsdp" else of_x_or_g
        for kept, of_x_or_g in zip(w_spec, (x_spec[1], g_spec[1]), strict=True)
    ]

    def reduced(x: Array, g: Array) -> Array:
        if "fsdp" not in w_spec:
            return jax.lax.psum(share(x, g).astype(jnp.float32), BATCH)
        axis = dw_spec.index("fsdp")
        dw = jax.lax.psum_scatter(share(x, g), "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(dw.astype(jnp.float32), "data")

    dw = jax.shard_map(reduced, in_specs=(x_spec, g_spec), out_specs=P(*dw_spec))(x, g)
    return matmul(g, gather_fsdp(w).T, x_spec).astype(x.dtype), reshard(dw.astype(w.dtype), *w_spec)


product.defvjp(product_forward, product_backward)


def matmul(x: Array, w: Array, spec: P, dtype: DTypeLike | None = None) -> Array:
    """x @ w, sharded by `spec`."""
    return jnp.matmul(x, w, preferred_element_type=dtype, out_sharding=spec if on_mesh() else None)


def gather_fsdp(w: Array) -> Array:
    """A weight gathered from its 'fsdp' shards; what else splits it stays."""
    if not on_mesh():
        return w
    return reshard(w, *(None if axis == "fsdp" else axis for axis in jax.typeof(w).sharding.spec))


def merge_heads(x: Float[Array, "..."], axis: int = -2) -> Float[Array, "..."]:
    """Joins axes H and N, H first and at `axis`; 'tensor' may split them."""
    axis %= x.ndim
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    if not on_mesh():
        return x.reshape(shape)
    spec = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, shape, out_sharding=P(*spec[: axis + 1], *spec[axis + 2 :]))


def split_heads(x: Float[Array, "*rest HN"], N: int) -> Float[Array, "*rest H N"]:
    """The inverse of `merge_heads` over the last axis."""
    shape = (*x.shape[:-1], x.shape[-1] // N, N)
    if not on_mesh():
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=P(*jax.typeof(x).sharding.spec, None))


def reshape(x: Shaped[Array, "B *rest"], *shape: int) -> Shaped[Array, "_ *new"]:
    """`x.reshape` where only the first axis is and stays split."""
    if not on_mesh():
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=P(jax.typeof(x).sharding.spec[0]))


def split_rows(x: Shaped[Array, "..."], parts: int, axis: int = 0) -> Shaped[Array, "..."]:
    """The batch, which is `axis`, in `parts` parts of every `parts`-th row, along an axis more."""
    shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    if not on_mesh():
        return x.reshape(shape)
    spec = jax.typeof(x).sharding.spec
    return jax.lax.reshape(x, shape, out_sharding=P(*spec[: axis + 1], None, *spec[axis + 1 :]))


def data_parallel(f: Callable[..., T]) -> Callable[..., T]:
    """`f(weights, *batch)` on each device's share of the batch, the weights replicated.

    So `f` is plain single-device code. Batch and results are trees of arrays whose first axis is
    the batch; gradients of the weights are summed over the devices.
    """

    def run(weights: Any, *batch: Any) -> T:
        if not on_mesh():
            return f(weights, *batch)
        split = P(BATCH)
        specs = (P(), *[split] * len(batch))
        return jax.shard_map(f, in_specs=specs, out_specs=split)(weights, *reshard(batch, BATCH))

    return run


def in_parts(f: Callable[[T], Any], batch: T, most: int, whole: bool = False) -> Any:
    """`f(batch)` in equal parts of at most `most` rows, one after another, to bound memory.

    `batch` is a tree of arrays (B, ...), not split over devices. The last part is padded with
    copies of the last row. `whole` parts have all of `most` rows where the batch has as many, and
    are always computed in a loop, so that the compiler sees each as a program of its own.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    parts = -(-count // most)
    size = min(most, count) if whole else -(-count // parts)
    part = lambda rows: f(jax.tree.map(lambda x: x[rows], batch))
    if parts == 1:
        return loop_once(f, batch) if whole else f(batch)
    rows = jnp.minimum(jnp.arange(parts * size), count - 1).reshape(parts, size)
    results = jax.lax.map(part, rows)
    return jax.tree.map(lambda x: x.reshape(parts * size, *x.shape[2:])[:count], results)


def loop_once(f: Callable[[T], Any], batch: T) -> Any:
    """`f(batch)` in a loop of one trip, which compilers would unroll if they could count it.

    Arrays of numbers, whose results depend on the batch; they have no reverse-mode gradients.
    """
    # Of the batch, so that it differs between devices as the results do.
    zero = jax.tree.leaves(batch)[0].ravel()[0].astype(jnp.int32) * 0
    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), jax.eval_shape(f, batch)
    )
    trips = jax.lax.optimization_barrier(jnp.int32(1))
    # `+ i`, which is 0: what is the same in all trips would be moved out of the loop.
    again = lambda i, _: f(jax.tree.map(lambda x: x[jnp.arange(len(x)) + i], batch))
    return jax.lax.fori_loop(0, trips, again, nothing)


def take(table_VC: Float[Array, "V C"], idx: Int[Array, "B *rest"]) -> Float[Array, "B *rest C"]:
    """Rows of a table, split over the batch as `idx` is."""
    if not on_mesh():
        return table_VC[idx]
    spec = P(BATCH, *[None] * idx.ndim)
    return reshard(table_VC, None, None).at[idx].get(out_sharding=spec)
