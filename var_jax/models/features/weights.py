"""Weights of published networks: taken from their files, checked, batch norms folded."""

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from var_jax import BadInput
from var_jax.checkpoints.torch.names import Tensors
from var_jax.models import backend

HIGHEST = jax.lax.Precision.HIGHEST  # less, and figures differ from those that others publish


class Conv(NamedTuple):
    """A convolution, or with a batch norm behind it both in one."""

    kernel: Float[Array | np.ndarray, "h w C F"]
    bias: Float[Array | np.ndarray, " F"]


def convolve(
    conv: Conv, x: Float[Array, "B H W C"], stride: int = 1, padding: Any = "SAME"
) -> Float[Array, "B _ _ F"]:
    """The convolution of NHWC images, with its bias, in their dtype."""
    result = backend.convolve(
        x, jnp.asarray(conv.kernel, x.dtype), (stride, stride), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=HIGHEST,
    )  # fmt: skip
    return result + jnp.asarray(conv.bias, x.dtype)[None, None, None]


def depthwise(conv: Conv, x: Float[Array, "B H W C"], stride: int = 1) -> Float[Array, "B _ _ C"]:
    """A convolution (h, w, 1, C) of each channel alone, padded by zeros.

    As a sum of products, which XLA makes one loop on CPUs: a tenth of the time of its convolution.
    """
    total = jnp.asarray(conv.bias)[None, None, None]
    shifts = neighbours(x, conv.kernel.shape[0], stride, 0.0)
    for shift, weight in zip(shifts, conv.kernel.reshape(-1, x.shape[-1]), strict=True):
        total += shift * weight[None, None, None]
    return total


def neighbours(
    x: Float[Array, "B H W C"], size: int, stride: int = 1, fill: float | None = None
) -> Iterator[Float[Array, "B _ _ C"]]:
    """The pixels of `size` × `size` windows, one after another: the image, shifted.

    Windows lie inside the image, or with `fill` at its pixels, padded by that.
    """
    B, H, W, C = x.shape
    kind = "VALID" if fill is None else "SAME"
    pads = jax.lax.padtype_to_pads((H, W), (size, size), (stride, stride), kind)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill or 0)
    h, w = ((side - size) // stride * stride + 1 for side in x.shape[1:3])
    for i, j in itertools.product(range(size), repeat=2):
        yield jax.lax.slice(x, (0, i, j, 0), (B, i + h, j + w, C), (1, stride, stride, 1))


def take(tensors: Tensors, name: str, *shape: int) -> Float[np.ndarray, "..."]:
    """A tensor in float32. Raises: BadInput if it is missing, of another shape, or not finite."""
    if name not in tensors:
        raise BadInput(f"tensor {name!r} is missing")
    if tuple(tensors[name].shape) != shape:
        raise BadInput(f"tensor {name!r} has shape {tensors[name].shape}, expected {shape}")
    array = np.asarray(tensors[name], np.float32)
    if not np.isfinite(array).all():
        raise BadInput(f"tensor {name!r} holds values that are not finite")
    return array


def take_conv(tensors: Tensors, name: str, h: int, w: int, c_in: int, c_out: int) -> Conv:
    """A convolution of torch, OIHW there."""
    kernel = take(tensors, f"{name}.weight", c_out, c_in, h, w).transpose(2, 3, 1, 0)
    return Conv(kernel, take(tensors, f"{name}.bias", c_out))


def take_conv_norm(
    tensors: Tensors, conv: str, norm: str, shape: tuple[int, int, int, int], eps: float
) -> Conv:
    """A convolution (h, w, C, F) without bias and the batch norm behind it as one convolution."""
    h, w, c_in, c_out = shape
    kernel = take(tensors, f"{conv}.weight", c_out, c_in, h, w).transpose(2, 3, 1, 0)
    parts = ("weight", "bias", "running_mean", "running_var")
    gain, bias, mean, variance = (
        take(tensors, f"{norm}.{part}", c_out).astype(np.float64) for part in parts
    )
    if (variance < 0).any():
        raise BadInput(f"tensor '{norm}.running_var' holds a negative variance")
    scale = gain / np.sqrt(variance + eps)
    return Conv((kernel * scale).astype(np.float32), (bias - mean * scale).astype(np.float32))


@contextlib.contextmanager
def expecting(path: object, what: str) -> Iterator[None]:
    """Says in the BadInput of a wrong file which file would be right."""
    try:
        yield
    except BadInput as error:
        reason = str(error).removesuffix(".").partition("; expected weights as")[0]
        named = reason if str(path) in reason else f"{path}: {reason}"
        raise BadInput(f"{named}; expected {what}.") from error


def in_package(package: str, file: str, extra: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises: BadInput if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).exists():
            return path
    raise BadInput(f"{file} needs one package more: pip install 'var_jax[{extra}]'.")
