"""What depends on the platform that code will run on, in one place."""

import contextlib
import contextvars
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from var_jax.models import cpu

_assumed: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def assume(platform: str) -> Iterator[None]:
    """Traces programs as for another platform than the one this process runs on."""
    token = _assumed.set(platform)
    try:
        yield
    finally:
        _assumed.reset(token)


def platform() -> str:
    """What the code being traced will run on: the mesh's devices, or else jax's default."""
    if _assumed.get():
        return _assumed.get()
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of that name; "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def unrolls(depth: int, remat: str) -> bool:
    """Whether layers are unrolled rather than scanned.

    On TPUs a scan copies what kernels read again backward into and out of its stacked results.
    """
    if platform() == "tpu":
        return remat != "full"  # which is for the least memory
    return platform() == "cpu" and cpu.unrolls(depth, remat)


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w C F"], strides, padding, **options
) -> Float[Array, "B _ _ F"]:
    """`jax.lax.conv_general_dilated`, as `nnx.Conv` calls it."""
    if platform() == "cpu" and cpu.winograd_pays(x, kernel, strides, padding):
        return cpu.winograd(x, kernel)
    if platform() == "cpu" and cpu.is_plain(x, kernel, **options):
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        return cpu.convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def has_fused_attention() -> bool:
    """Whether cuDNN's attention runs there: on NVIDIA's GPUs from Ampere (8.0) on."""
    found = getattr(jax.local_devices()[0], "compute_capability", "")
    known = re.fullmatch(r"\d+\.\d+", found)  # others, like gfx90a, are AMD's
    return platform() in ("cuda", "gpu") and known is not None and float(found) >= 8


def bits_a_round() -> int:
    """Bits of a threshold settled in one pass over the logits; on TPUs passes cost more than
    comparisons.
    """
    return 2 if platform() == "tpu" else 1


def whole_parts() -> bool:
    """Whether images are encoded and decoded in whole parts (`in_parts`), at up to twice the work.

    XLA's TPU compiler tiles convolutions badly outside of a loop, and copies more where images do
    not come in eights (benchmarks/aot.md).
    """
    return platform() == "tpu"
