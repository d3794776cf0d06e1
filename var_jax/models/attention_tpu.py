"""Attention over blocks of tokens as Pallas kernels for TPU, with QK-norm inside.

One program works on one image and 128 lanes of heads (two heads of 64): all L tokens fit in VMEM,
so a row of the softmax is there at once, and only q, k, v are kept for the backward pass. Operands
stay (B, L, H·N), as matrix products make and take them: nothing is transposed, or padded from 64
to 128 lanes, on the way. Rows are cut into tiles along the blocks, and a tile is multiplied only
with the keys that one of its rows may see.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

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
VMEM_BYTES = 64 * 2**20  # of 128 MB a core; the compiler's default of 16 is short for 2240 tokens


def attention(
    q: Float[Array, "B L H N"],
    k: Float[Array, "B L H N"],
    v: Float[Array, "B L H N"],
    q_bias: Float[Array, "H N"],
    scale: Float[Array, " H"],
    *,
    blocks: tuple[int, ...],
    qk_norm: bool,
    interpret: bool,
) -> Float[Array, "B L H N"]:
    """As `models.attention.attention`, whose implementation "kernel" this is.

    `blocks` are the lengths of the blocks of the pattern.
    """
    static = Static(blocks, q.shape[-1], qk_norm, interpret)
    mixed: Array = _attention(
        static, _lanes(q_bias, scale), *(flatten_tokens(merge_heads(x)) for x in (q, k, v))
    )  # type: ignore
    return split_heads(unflatten_tokens(mixed, q.shape[0]), q.shape[-1])


def cached(
    q: Float[Array, "B l H N"],
    k: Float[Array, "depth B L HN"],
    v: Float[Array, "depth B L HN"],
    layer: Int32[Array, ""],
    *,
    stop: int,
    q_bias: Float[Array, "H N"],
    scale: Float[Array, " H"],
    qk_norm: bool,
    interpret: bool,
) -> Float[Array, "B l H N"]:
    """Attention of new tokens over the first `stop` tokens in the cache of a layer.

    The kernel reads the cache where it lies. Its name carries what it costs: images, heads, new
    tokens and keys.
    """
    static = Static((q.shape[1],), q.shape[-1], qk_norm, interpret)
    operands = layer[None], _lanes(q_bias, scale), merge_heads(q), k, v
    run = functools.partial(_call_cached, static, stop)
    if on_mesh():
        spec, kept = P(BATCH, None, "tensor"), P(None, BATCH, None, "tensor")
        ins = (P(), P(None, "tensor"), spec, kept, kept)
        run = jax.shard_map(run, in_specs=ins, out_specs=spec, check_vma=False)
    return split_heads(run(*operands), q.shape[-1])


def _lanes(q_bias, scale):
    """q_bias and scale of each lane, (2, H·N), float32."""
    lanes = jnp.stack([q_bias, jnp.broadcast_to(scale[:, None], q_bias.shape)])
    return merge_heads(reshard(lanes.astype(jnp.float32), None, "tensor"))


class Static(NamedTuple):
    """What a kernel is compiled for."""

    blocks: tuple[int, ...]
    head_dim: int
    qk_norm: bool
    interpret: bool


def tiles(blocks: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, number of keys) of each tile: at most 256 rows, whole blocks where
    they fit, starting where sublanes do."""
    ends, found, start = list(itertools.accumulate(blocks)), [], 0
    aligned = [end if end == ends[-1] else end // SUBLANES * SUBLANES for end in ends]
    while start < ends[-1]:
        stop = max((e for e in aligned if start < e <= start + ROWS), default=start + ROWS)
        found.append((start, stop, next(end for end in ends if end >= stop)))
        start = stop
    return found


def padded_flops(blocks: tuple[int, ...], head_dim: int, backward: bool) -> int:
    """Operations of the matrix products of one head and image, as the matrix unit sees them.

    Every dimension is padded to 128; the forward pass has two products a tile, the backward five.
    """
    up = lambda n: -(-n // LANES) * LANES
    area = sum(up(stop - start) * up(keys) for start, stop, keys in tiles(blocks))
    return 2 * area * up(head_dim) * (5 if backward else 2)


def cached_flops(new: int, keys: int, head_dim: int) -> int:
    """As `padded_flops`, of the kernel of cached attention."""
    up = lambda n: -(-n // LANES) * LANES
    return 2 * 2 * up(new) * up(keys) * up(head_dim)


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
        L = sum(static.blocks)
        operands = [operands[0], *(x.reshape(-1, L, x.shape[-1]) for x in operands[1:])]
        B, _, F = operands[1].shape
        tokens = pl.BlockSpec((1, L, LANES), lambda b, h: (b, 0, h))
        lanes = pl.BlockSpec((1, 2, LANES), lambda b, h: (b, 0, h))
        shape = lambda dtype: jax.ShapeDtypeStruct((B, L if dtype else 2, F), dtype or jnp.float32)
        made = pl.pallas_call(
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
            name="block_causal" + kernel.__name__.removesuffix("_kernel"),
        )(*operands)
        return tuple(x.reshape(-1, F) if d else x for x, d in zip(made, dtypes, strict=True))

    if not on_mesh():
        return run(*operands)
    spec, gradient = P(BATCH, "tensor"), P(BATCH, None, "tensor")
    ins = (P(None, "tensor"), *[spec] * (len(operands) - 1))
    outs = tuple(spec if dtype else gradient for dtype in dtypes)
    return jax.shard_map(run, in_specs=ins, out_specs=outs, check_vma=False)(*operands)


def _call_cached(static, stop, layer, lanes, q, k, v):
    """Runs the kernel of cached attention on one device's images and heads."""
    B, length, F = q.shape
    rows = min(-(-stop // 16) * 16, k.shape[2])  # of the cache: whole tiles of it, or all
    tokens = pl.BlockSpec((1, length, LANES), lambda b, h, _: (b, 0, h))
    kept = pl.BlockSpec((None, 1, rows, LANES), lambda b, h, layer: (layer[0], b, 0, h))
    return pl.pallas_call(
        functools.partial(_cached_kernel, static=static, keys=stop),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, pl.cdiv(F, LANES)),
            in_specs=[pl.BlockSpec((2, LANES), lambda b, h, _: (0, h)), tokens, kept, kept],
            out_specs=tokens,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=static.interpret,
        name=f"cached_attention_{B}x{F // static.head_dim}x{length}x{stop}",
    )(layer, lanes, q, k, v)


def _cached_kernel(_, lanes_ref, q_ref, k_ref, v_ref, o_ref, *, static, keys):
    for head in _heads(static):
        q, k = _queries(lanes_ref, q_ref, head, static)[0], _keys(k_ref, head, static)[0][:keys]
        v = v_ref[0, :, head][:keys]
        for start, stop, _ in tiles(static.blocks):
            weight = _softmax(q[start:stop], k, start, static.blocks)
            o_ref[0, start:stop, head] = _dot(weight.astype(v.dtype), v, 1, 0).astype(o_ref.dtype)


def _forward_kernel(lanes_ref, q_ref, k_ref, v_ref, o_ref, *_, static):
    for head in _heads(static):
        q, k = _queries(lanes_ref, q_ref, head, static)[0], _keys(k_ref, head, static)[0]
        v = v_ref[0, :, head]
        for start, stop, keys in tiles(static.blocks):
            weight = _softmax(q[start:stop], k[:keys], start, static.blocks)
            mixed = _dot(weight.astype(v.dtype), v[:keys], 1, 0)
            o_ref[0, start:stop, head] = mixed.astype(o_ref.dtype)


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
        for start, stop, keys in tiles(static.blocks):
            weight = _softmax(q[start:stop], k[:keys], start, static.blocks)
            do = do_ref[0, start:stop, head]
            dv_sum[:keys] += _dot(weight.astype(dtype), do, 0, 0)
            dweight = _dot(do, v[:keys], 1, 1)
            dlogits = weight * (dweight - (weight * dweight).sum(axis=1, keepdims=True))
            dlogits = dlogits.astype(dtype)
            dk_sum[:keys] += _dot(dlogits, q[start:stop], 0, 0)
            dq.append(_dot(dlogits, k[:keys], 1, 0))
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


def _softmax(q, k, start, blocks):
    """Attention weights of a tile of rows over the keys, float32."""
    logits = _dot(q, k, 1, 1)
    rows, keys = logits.shape
    ends = [end for end in itertools.accumulate(blocks) if start < end < start + rows]
    if ends:  # the tile has rows of several blocks: each block adds to the keys that are seen
        row = start + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        if set(blocks) == {1}:
            seen = row + 1
        else:
            steps = zip(ends, [*ends[1:], keys], strict=True)
            seen = ends[0] + sum(jnp.where(row >= end, stop - end, 0) for end, stop in steps)
        logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1) < seen, logits, -1e30)
    weight = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def _dot(a, b, a_axis, b_axis):
    """a · b over the given axes, accumulated in float32."""
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
