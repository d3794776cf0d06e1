"""Attention over blocks of tokens as Pallas kernels for TPU, with QK-norm inside.

One program works on one image and 128 lanes of heads (two heads of 64): all L tokens fit in VMEM,
so a row of the softmax is there at once, and only q, k, v are kept for the backward pass. Operands
stay (B, L, H·N), as matrix products make and take them: nothing is transposed, or padded from 64
to 128 lanes, on the way. Rows are cut into tiles along the blocks, and a tile is multiplied only
with the keys that one of its rows may see.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from var_jax.schedule import Pattern
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import (
    flatten_tokens,
    merge_heads,
    on_mesh,
    reshard,
    split_heads,
    unflatten_tokens,
)

LANES, SUBLANES, ROWS = 128, 8, 256
PACKED = 2 * SUBLANES  # rows of bfloat16 in a tile of memory
VMEM_BYTES = 64 * 2**20  # of 128 MB a core; the compiler's default of 16 is short for 2240 tokens


def attention(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B L H N"],
    v: Float[Array, "B L H N"],
    q_bias: Float[Array, "H N"],
    scale: Float[Array, " H"],
    *,
    pattern: Pattern,
    qk_norm: bool,
    interpret: bool,
) -> Float[Array, "B L H N"]:
    """As `models.attention.attention`, whose implementation "kernel" this is."""
    static = Static(pattern, q.shape[-1], qk_norm, interpret)
    mixed: Array = _attention(
        static, _lanes(q_bias, scale), *(flatten_tokens(merge_heads(x)) for x in (q, k, v))
    )  # type: ignore
    return split_heads(unflatten_tokens(mixed, q.shape[0]), q.shape[-1])


def cached(
    q: Float[Array, "B l H N"],
    k: Float[Array, "B l H N"],
    v: Float[Array, "B l H N"],
    kept_k: Float[Array, "depth B S HN"],
    kept_v: Float[Array, "depth B S HN"],
    layer: Int32[Array, ""],
    *,
    kept: int,
    q_bias: Float[Array, "H N"],
    scale: Float[Array, " H"],
    qk_norm: bool,
    interpret: bool,
) -> Float[Array, "B l H N"]:
    """Attention of new tokens over themselves and the first `kept` tokens in the cache of a layer.

    The kernel reads the cache where it lies. Its name carries what it costs: images, heads, new
    and kept tokens.
    """
    static = Static(Pattern.full(q.shape[1]), q.shape[-1], qk_norm, interpret)
    operands = [layer[None], _lanes(q_bias, scale), *map(merge_heads, (q, k, v)), kept_k, kept_v]
    run = functools.partial(_call_cached, static, kept)
    if on_mesh():
        spec, cache = P(BATCH, None, "tensor"), P(None, BATCH, None, "tensor")
        ins = (P(), P(None, "tensor"), *[spec] * 3, *[cache] * 2)
        run = jax.shard_map(run, in_specs=ins, out_specs=spec, check_vma=False)
    return split_heads(run(*operands), q.shape[-1])


def _lanes(q_bias, scale):
    """q_bias and scale of each lane, (2, H·N), float32."""
    lanes = jnp.stack([q_bias, jnp.broadcast_to(scale[:, None], q_bias.shape)])
    return merge_heads(reshard(lanes.astype(jnp.float32), None, "tensor"))


class Static(NamedTuple):
    """What a kernel is compiled for."""

    pattern: Pattern
    head_dim: int
    qk_norm: bool
    interpret: bool


def whole_tiles(rows: int) -> int:
    """A number of rows, rounded up to whole tiles of memory."""
    return -(-rows // PACKED) * PACKED


def tiles(pattern: Pattern) -> list[tuple[slice, slice]]:
    """Rows and keys of each tile: at most 256 rows, whole blocks where they fit.

    Both start where sublanes do.
    """
    found, start, length = [], 0, pattern.length
    aligned = [end if end == length else end // SUBLANES * SUBLANES for end in pattern.ends]
    while start < length:
        stop = max((e for e in aligned if start < e <= start + ROWS), default=start + ROWS)
        blocks = _blocks(pattern, slice(start, stop))
        keys = slice(blocks[0][1].start // PACKED * PACKED, blocks[-1][1].stop)
        found.append((slice(start, stop), keys))
        start = stop
    return found


def _blocks(pattern: Pattern, rows: slice) -> list[tuple[int, slice]]:
    """Of each block that has some of the rows: where it starts, and the keys that it sees."""
    both = zip((0, *pattern.ends), pattern.seen, strict=False)
    return [(start, seen) for start, seen in both if start < rows.stop and seen.stop > rows.start]


def padded_flops(pattern: Pattern, head_dim: int, backward: bool) -> int:
    """Operations of the matrix products of one head and image, as the matrix unit sees them.

    Every dimension is padded to 128; the forward pass has two products a tile, the backward five.
    """
    up = lambda n: -(-n // LANES) * LANES
    area = sum(up(r.stop - r.start) * up(k.stop - k.start) for r, k in tiles(pattern))
    return 2 * area * up(head_dim) * (5 if backward else 2)


def cached_flops(new: int, kept: int, head_dim: int) -> int:
    """As `padded_flops`, of the kernel of cached attention."""
    up = lambda n: -(-n // LANES) * LANES
    return 2 * 2 * up(new) * (up(new) + up(kept)) * up(head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, lanes, q, k, v):
    return _call(static, _forward_kernel, (lanes, q, k, v), [q.dtype])[0]


def _forward(static, lanes, q, k, v):
    return _attention(static, lanes, q, k, v), (lanes, q, k, v)


def _backward(static, kept, grad):
    *dqkv, dlanes = _call(static, _backward_kernel, (*kept, grad), [grad.dtype] * 3 + [None])
    return dlanes.sum(axis=0), *dqkv


_attention.defvjp(_forward, _backward)


def _call(static, kernel, operands, dtypes):
    """Runs a kernel on each device's images and heads.

    Operands are (B·L, H·N), but for the first, (2, H·N): each lane's q_bias and scale. So are the
    results, in `dtypes`; None stands for the gradient of each image's lanes, (B, 2, H·N), float32.
    """

    def run(*operands):
        L = static.pattern.length
        operands = [operands[0], *(x.reshape(-1, L, x.shape[-1]) for x in operands[1:])]
        B, _, F = operands[1].shape
        tokens = pl.BlockSpec((1, L, LANES), lambda b, h: (b, 0, h))
        lanes = pl.BlockSpec((1, 2, LANES), lambda b, h: (b, 0, h))
        shape = lambda dtype: jax.ShapeDtypeStruct((B, L if dtype else 2, F), dtype or jnp.float32)
        results = pl.pallas_call(
            functools.partial(kernel, static=static),
            grid=(B, pl.cdiv(F, LANES)),
            in_specs=[
                pl.BlockSpec((2, LANES), lambda b, h: (0, h)),
                *[tokens] * (len(operands) - 1),
            ],
            out_specs=tuple(tokens if dtype else lanes for dtype in dtypes),
            out_shape=tuple(shape(dtype) for dtype in dtypes),
            scratch_shapes=[pltpu.VMEM((L, static.head_dim), jnp.float32)] * 2,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=static.interpret,
            name=f"block_causal{kernel.__name__[:-7]}_{B}x{F // static.head_dim}x{L}",
        )(*operands)
        return tuple(x.reshape(-1, F) if d else x for x, d in zip(results, dtypes, strict=True))

    if not on_mesh():
        return run(*operands)
    spec, gradient = P(BATCH, "tensor"), P(BATCH, None, "tensor")
    ins = (P(None, "tensor"), *[spec] * (len(operands) - 1))
    outs = tuple(spec if dtype else gradient for dtype in dtypes)
    return jax.shard_map(run, in_specs=ins, out_specs=outs, check_vma=False)(*operands)


def _call_cached(static, kept, layer, lanes, q, k, v, kept_k, kept_v):
    """Runs the kernel of cached attention on one device's images and heads."""
    B, length, F = q.shape
    rows = min(whole_tiles(kept), kept_k.shape[2])
    tokens = pl.BlockSpec((1, length, LANES), lambda b, h, _: (b, 0, h))
    cache = pl.BlockSpec((None, 1, rows, LANES), lambda b, h, layer: (layer[0], b, 0, h))
    lane = pl.BlockSpec((2, LANES), lambda b, h, _: (0, h))
    return pl.pallas_call(
        functools.partial(_cached_kernel, static=static, kept=kept),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, pl.cdiv(F, LANES)),
            in_specs=[lane, *[tokens] * 3, *[cache] * 2],
            out_specs=tokens,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=static.interpret,
        name=f"cached_attention_{B}x{F // static.head_dim}x{length}x{kept}",
    )(layer, lanes, q, k, v, kept_k, kept_v)


def _cached_kernel(
    _, lanes_ref, q_ref, k_ref, v_ref, kept_k_ref, kept_v_ref, o_ref, *, static, kept
):
    for head in _heads(static):
        q = _queries(lanes_ref, q_ref, head, static)[0]
        old, new = (_keys(ref, head, static)[0] for ref in (kept_k_ref, k_ref))
        values = kept_v_ref[0, :, head], v_ref[0, :, head]
        seen = jax.lax.broadcasted_iota(jnp.int32, (1, len(old)), 1) < kept
        for rows, _ in tiles(static.pattern):  # one softmax over both parts of the keys
            logits = jnp.where(seen, _dot(q[rows], old, 1, 1), -1e30), _dot(q[rows], new, 1, 1)
            most = jnp.maximum(*(x.max(axis=1, keepdims=True) for x in logits))
            weights = [jnp.exp(x - most) for x in logits]
            total = sum(x.sum(axis=1, keepdims=True) for x in weights)
            parts = [(x / total).astype(v.dtype) for x, v in zip(weights, values, strict=True)]
            mixed = [_dot(x, v, 1, 0) for x, v in zip(parts, values, strict=True)]
            o_ref[0, rows, head] = (mixed[0] + mixed[1]).astype(o_ref.dtype)


def _forward_kernel(lanes_ref, q_ref, k_ref, v_ref, o_ref, *_, static):
    for head in _heads(static):
        q, k = _queries(lanes_ref, q_ref, head, static)[0], _keys(k_ref, head, static)[0]
        v = v_ref[0, :, head]
        for rows, keys in tiles(static.pattern):
            weight = _softmax(q, k, rows, keys, static.pattern)
            mixed = _dot(weight.astype(v.dtype), v[keys], 1, 0)
            o_ref[0, rows, head] = mixed.astype(o_ref.dtype)


def _backward_kernel(
    lanes_ref, q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, dlanes_ref, dk_sum, dv_sum,
    *, static,
):  # fmt: skip
    dtype = v_ref.dtype
    for head in _heads(static):
        q, q_unit, q_rate, scale = _queries(lanes_ref, q_ref, head, static)
        k, k_unit, k_rate = _keys(k_ref, head, static)
        v, dq = v_ref[0, :, head], []
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)
        for rows, keys in tiles(static.pattern):
            weight = _softmax(q, k, rows, keys, static.pattern)
            do = do_ref[0, rows, head]
            dv_sum[keys] += _dot(weight.astype(dtype), do, 0, 0)
            dweight = _dot(do, v[keys], 1, 1)
            dlogits = weight * (dweight - (weight * dweight).sum(axis=1, keepdims=True))
            dlogits = dlogits.astype(dtype)
            dk_sum[keys] += _dot(dlogits, q[rows], 0, 0)
            dq.append(_dot(dlogits, k[keys], 1, 0))
        dq, dk = jnp.concatenate(dq), dk_sum[...]
        dscale = (dq * q_unit).sum(axis=0, keepdims=True)
        dq, dk = _unit_gradient(dq * scale, q_unit, q_rate), _unit_gradient(dk, k_unit, k_rate)
        dlanes_ref[0, :, head] = jnp.concatenate([dq.sum(axis=0, keepdims=True), dscale])
        dq_ref[0, :, head], dk_ref[0, :, head] = dq.astype(dtype), dk.astype(dtype)
        dv_ref[0, :, head] = dv_sum[...].astype(dtype)


def _heads(static):
    return [pl.ds(start, static.head_dim) for start in range(0, LANES, static.head_dim)]


def _queries(lanes_ref, q_ref, head, static):
    """Scaled queries; before scaling, float32; one over their lengths; the scale."""
    scale = lanes_ref[1:, head]
    unit, rate = _unit(q_ref[0, :, head].astype(jnp.float32) + lanes_ref[:1, head], static)
    return (unit * scale).astype(q_ref.dtype), unit, rate, scale


def _keys(k_ref, head, static):
    """Keys; in float32; one over their lengths."""
    unit, rate = _unit(k_ref[0, :, head].astype(jnp.float32), static)
    return unit.astype(k_ref.dtype), unit, rate


def _unit(x, static):
    """Under QK-norm unit vectors and one over the lengths, else x and None."""
    if not static.qk_norm:
        return x, None
    rate = jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=1, keepdims=True), 1e-24))
    return x * rate, rate


def _unit_gradient(grad, unit, rate):
    """The gradient behind `_unit`."""
    if rate is None:
        return grad
    return rate * (grad - unit * (grad * unit).sum(axis=1, keepdims=True))


def _softmax(q, k, rows, keys, pattern):
    """Attention weights of a tile of rows over its keys, float32."""
    logits = _dot(q[rows], k[keys], 1, 1)
    blocks = _blocks(pattern, rows)
    column = keys.start + jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    first, stop = (
        _by_row(rows, [(start, getattr(seen, side)) for start, seen in blocks])
        for side in ("start", "stop")
    )
    if not (isinstance(stop, int) and stop == keys.stop):
        logits = jnp.where(column < stop, logits, -1e30)
    if not (isinstance(first, int) and first == keys.start):
        logits = jnp.where(column >= first, logits, -1e30)
    weight = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def _by_row(rows, values):
    """What each row of a tile has, given by block as (first row, value): an int if all the same."""
    (start, found), *others = values
    steps = [(row, b - a) for (_, a), (row, b) in zip(values, others, strict=False) if a != b]
    if not steps:
        return found
    row = rows.start + jax.lax.broadcasted_iota(jnp.int32, (rows.stop - rows.start, 1), 0)
    if steps == [(start + i, 1) for i in range(1, rows.stop - start)]:
        return row - start + found  # all blocks are of one token: causal
    return found + sum(jnp.where(row >= at, step, 0) for at, step in steps)


def _dot(a, b, a_axis, b_axis):
    """a · b over the given axes, accumulated in float32."""
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
