"""InceptionV3 as FID uses it: the TensorFlow graph of 2015-12-05, in JAX.

Not the Inception of torchvision: images are resized as by TensorFlow 1, average pools do not count
the padding, the last block pools by maximum, there are 1008 classes. Three of its layers are in
use: the pooled features (FID, KID, precision, recall), seven channels of an earlier layer (sFID),
and logits without bias (Inception score).

Szegedy et al., arXiv 1512.00567; Heusel et al., arXiv 1706.08500; sFID: Nash et al., 2103.03841.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.models.features.resizing import resize_tensorflow
from var_jax.models.features.weights import (
    HIGHEST,
    Conv,
    convolve,
    expecting,
    neighbours,
    take,
    take_conv_norm,
)

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
WANTED = f"InceptionV3 of FID, {FILE}, from {URL}, as --features"
SIZE = 299
NUM_SPATIAL = 7  # channels that sFID takes

# A block is a line a branch: the results of all of them are joined. A branch is steps in a row,
# pools and convolutions: name, kernel, channels. "/s": without padding, every s-th pixel.
STEM = """
    Conv2d_1a_3x3 3x3/2 32 > Conv2d_2a_3x3 3x3/1 32 > Conv2d_2b_3x3 3x3 64 > max/2 > \
    Conv2d_3b_1x1 1x1 80 > Conv2d_4a_3x3 3x3/1 192 > max/2
"""
A = """
    branch1x1 1x1 64
    branch5x5_1 1x1 48 > branch5x5_2 5x5 64
    branch3x3dbl_1 1x1 64 > branch3x3dbl_2 3x3 96 > branch3x3dbl_3 3x3 96
    mean > branch_pool 1x1 {}
"""
B = """
    branch3x3 3x3/2 384
    branch3x3dbl_1 1x1 64 > branch3x3dbl_2 3x3 96 > branch3x3dbl_3 3x3/2 96
    max/2
"""
C = """
    branch1x1 1x1 192
    branch7x7_1 1x1 {0} > branch7x7_2 1x7 {0} > branch7x7_3 7x1 192
    branch7x7dbl_1 1x1 {0} > branch7x7dbl_2 7x1 {0} > branch7x7dbl_3 1x7 {0} > \
    branch7x7dbl_4 7x1 {0} > branch7x7dbl_5 1x7 192
    mean > branch_pool 1x1 192
"""
D = """
    branch3x3_1 1x1 192 > branch3x3_2 3x3/2 320
    branch7x7x3_1 1x1 192 > branch7x7x3_2 1x7 192 > branch7x7x3_3 7x1 192 > \
    branch7x7x3_4 3x3/2 192
    max/2
"""
E = """
    branch1x1 1x1 320
    branch3x3_1 1x1 384 > branch3x3_2a 1x3 384
    branch3x3_1 1x1 384 > branch3x3_2b 3x1 384
    branch3x3dbl_1 1x1 448 > branch3x3dbl_2 3x3 384 > branch3x3dbl_3a 1x3 384
    branch3x3dbl_1 1x1 448 > branch3x3dbl_2 3x3 384 > branch3x3dbl_3b 3x1 384
    {} > branch_pool 1x1 192
"""
BLOCKS = {
    "": STEM,
    "Mixed_5b.": A.format(32), "Mixed_5c.": A.format(64), "Mixed_5d.": A.format(64),
    "Mixed_6a.": B,
    "Mixed_6b.": C.format(128), "Mixed_6c.": C.format(160), "Mixed_6d.": C.format(160),
    "Mixed_6e.": C.format(192),
    "Mixed_7a.": D,
    "Mixed_7b.": E.format("mean"), "Mixed_7c.": E.format("max"),
}  # fmt: skip


class Inception(NamedTuple):
    """The weights: 94 convolutions by name, and the last layer."""

    convs: dict[str, Conv]
    classes: Float[Array | np.ndarray, "2048 1008"]


class Layers(NamedTuple):
    """What the metrics read of an image."""

    pool: Float[Array, "B 2048"]
    spatial: Float[Array, "B 2023"]
    logits: Float[Array, "B 1008"]


class Step(NamedTuple):
    """A convolution, or a pool ("mean" or "max", without kernel and channels)."""

    name: str
    stride: int  # 0: padded, every pixel
    kernel: tuple[int, int] = (3, 3)
    channels: int = 0


def branches(block: str) -> Iterator[list[Step]]:
    """The branches of a block."""
    for line in filter(None, map(str.strip, block.splitlines())):
        yield [parse(*step.split()) for step in line.split(">")]


def parse(name: str, kernel: str = "", channels: str = "0") -> Step:
    """A step as the tables have it."""
    size, _, stride = (kernel or name).partition("/")
    if not kernel:
        return Step(size, int(stride or 0))
    h, w = map(int, size.split("x"))
    return Step(name, int(stride or 0), (h, w), int(channels))


def shapes() -> dict[str, tuple[int, int, int, int]]:
    """The shape (h, w, C, F) of each convolution's kernel, by name."""
    found, block_in = {}, 3
    for prefix, block in BLOCKS.items():
        block_out = 0
        for branch in branches(block):
            width = block_in
            for step in branch:
                if step.channels:
                    found[prefix + step.name] = (*step.kernel, width, step.channels)
                width = step.channels or width
            block_out += width
        block_in = block_out
    return found


def load_inception(path: str | Path) -> Inception:
    """The weights, as float32 arrays of NumPy, of the file that pytorch-fid or torch-fidelity use.

    Raises: BadInput if there is no such file, or it holds another network.
    """
    with expecting(path, WANTED):
        tensors = open_tensors(path)
        convs = {
            name: take_conv_norm(tensors, f"{name}.conv", f"{name}.bn", shape, eps=1e-3)
            for name, shape in shapes().items()
        }
        return Inception(convs, take(tensors, "fc.weight", 1008, 2048).T)


def abstract_inception(sharding: jax.sharding.Sharding | None = None) -> Inception:
    """The shapes of the weights, to compile without them."""

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    convs = {name: Conv(array(*shape), array(shape[-1])) for name, shape in shapes().items()}
    return Inception(convs, array(2048, 1008))


def inception(weights: Inception, image: UInt8[Array, "B H W 3"]) -> Layers:
    """The features of images of any size. Single-device code."""
    x = (resize_tensorflow(image, SIZE) - 128) / 128
    spatial = x
    for prefix, block in BLOCKS.items():
        x = run_block(weights.convs, prefix, block, x)
        if prefix == "Mixed_6d.":  # branch1x1 comes first in it
            spatial = x[..., :NUM_SPATIAL].reshape(x.shape[0], -1)
    pool = x.mean((1, 2))
    return Layers(pool, spatial, jnp.matmul(pool, weights.classes, precision=HIGHEST))


def run_block(convs: dict[str, Conv], prefix: str, block: str, x: Array) -> Array:
    """The joined branches. Steps that two of them share are made once."""
    outputs: dict[tuple[str, ...], Array] = {(): x}
    joined = []
    for branch in branches(block):
        path: tuple[str, ...] = ()
        for step in branch:
            y, path = outputs[path], (*path, step.name)
            if path in outputs:
                continue
            if step.channels:
                outputs[path] = jax.nn.relu(apply(convs[prefix + step.name], y, step.stride))
            else:
                outputs[path] = POOLS[step.name](y, step.stride)
        joined.append(outputs[path])
    return jnp.concatenate(joined, axis=-1)


def apply(conv: Conv, x: Array, stride: int) -> Array:
    """A convolution, padded where the stride is 0."""
    if stride != 1:
        return convolve(conv, x, stride or 1, "VALID" if stride else "SAME")
    # XLA on CPUs takes a quarter of the time for all pixels as for those of whole windows.
    return convolve(conv, x)[:, 1:-1, 1:-1]


def max_pool(x: Array, stride: int) -> Array:
    """The maximum of 3×3 pixels; padded where the stride is 0."""
    windows = neighbours(x, 3, stride or 1, None if stride else -jnp.inf)
    return functools.reduce(jnp.maximum, windows)


def mean_pool(x: Array, stride: int) -> Array:
    """The mean of 3×3 pixels, at the border of fewer."""
    add = lambda x: functools.reduce(jnp.add, neighbours(x, 3, stride or 1, 0.0))
    return add(x) / add(jnp.ones_like(x[:1, :, :, :1]))


POOLS = {"mean": mean_pool, "max": max_pool}
