"""How model code speaks about the mesh ('data', 'fsdp', 'tensor'), and runs as well without one.

Axes are explicit: an array's type says how it is split, and the helpers here are the only places
where that changes. Outside `jax.set_mesh` each of them is the plain operation.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

BATCH = ("data", "fsdp")  # the batch is split over both
Axes = str | tuple[str, ...] | None


def on_mesh() -> bool:
    """Whether code is being traced under a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def round_up(count: int) -> int:
    """The smallest batch of at least `count` that the mesh splits evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    shares = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // shares) * shares


def pin(x: Array, *spec: Axes) -> Array:
    """`x` laid out as `spec` says, one entry for each leading axis (the rest are not split)."""
    return jax.sharding.reshard(x, P(*spec)) if on_mesh() else x


def einsum(equation: str, x: Array, w: Array, *spec: Axes) -> Array:
    """`jnp.einsum` with the result laid out as `spec` says."""
    return jnp.einsum(equation, x, w, out_sharding=P(*spec) if on_mesh() else None)


def project(x: Float[Array, "B L D"], w: Float[Array, "D F"], out: Axes = None) -> Array:
    """x @ w over the last axis, whose result (B,L,F) is split over `out`.

    As one product of matrices: XLA's CPU backend takes the gradient of a batched one much slower.
    """
    B, L, D = x.shape
    if not on_mesh():
        return (x.reshape(B * L, D) @ w).reshape(B, L, -1)
    inner = jax.typeof(x).sharding.spec[-1]
    x = jax.lax.reshape(x, (B * L, D), out_sharding=P(BATCH, inner))
    y = einsum("MD,DF->MF", x, w, BATCH, out)
    return jax.lax.reshape(y, (B, L, w.shape[1]), out_sharding=P(BATCH, None, out))


def reshape(x: Float[Array, "B *rest"], *shape: int) -> Float[Array, "B *new"]:
    """`x.reshape` of all axes but the first, which alone may be split."""
    if not on_mesh():
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=P(jax.typeof(x).sharding.spec[0]))


def take(table_VC: Float[Array, "V C"], idx: Int[Array, "B *rest"]) -> Float[Array, "B *rest C"]:
    """Rows of a table, split over the batch as `idx` is."""
    if not on_mesh():
        return table_VC[idx]
    spec = P(BATCH, *[None] * idx.ndim)
    return pin(table_VC, None, None).at[idx].get(out_sharding=spec)


def path_name(path: tuple) -> str:
    """A leaf's place in a model as text, like "blocks.qkv"."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
