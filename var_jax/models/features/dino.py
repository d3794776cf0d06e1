"""DINO's vision transformers, at 224 px.

DINOv2 (ViT-S/14, B/14, L/14; Oquab et al., arXiv 2304.07193) is for the Fréchet distance in its
features, of ViT-L/14 (Stein et al., arXiv 2306.04675). DINO ViT-S/16 (Caron et al.,
arXiv 2104.14294) is what a discriminator looks at.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from var_jax import BadInput
from var_jax.checkpoints.torch.convert import open_tensors
from var_jax.checkpoints.torch.names import Tensors
from var_jax.models.features.resizing import resize_pillow
from var_jax.models.features.weights import HIGHEST, Conv, convolve, expecting, take, take_conv
from var_jax.models.resize import bicubic_matrix

FILES = "dinov2_vitl14_pretrain.pth or dinov2_vitb14_pretrain.pth"
URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
URL_S16 = (
    "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
)
SIZE, PATCH, HEAD_DIM = 224, 14, 64
PATCH_S16, WIDTH_S16, DEPTH_S16, GROUPS_S16 = 16, 384, 12, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
OFFSET = 0.1  # a quirk of the release where it resizes position embeddings


class Linear(NamedTuple):
    """A linear layer, or the gain and bias of a layer norm."""

    weight: Float[Array | np.ndarray, "*out_in"]
    bias: Float[Array | np.ndarray, "*out"]


class Block(NamedTuple):
    """A pre-norm transformer block whose branches are scaled channel by channel."""

    norm1: Linear
    qkv: Linear
    proj: Linear
    scale1: Float[Array | np.ndarray, "*D"]
    norm2: Linear
    fc1: Linear
    fc2: Linear
    scale2: Float[Array | np.ndarray, "*D"]


class DinoV2(NamedTuple):
    """The weights, of DINO as well; those of the blocks are stacked."""

    patch: Conv
    start: Float[Array | np.ndarray, " D"]  # the class token at its position
    position: Float[Array | np.ndarray, "P D"]
    blocks: Block
    norm: Linear


def load_dinov2(path: str | Path) -> DinoV2:
    """The weights, as float32 arrays of NumPy, of an official file; sizes are read from it.

    Raises: BadInput if there is no such file, or it holds another network.
    """
    with expecting(path, f"DINOv2 without registers, {FILES}, from {URL}, as --features"):
        tensors = open_tensors(path)
        if "cls_token" not in tensors or "register_tokens" in tensors:
            raise BadInput("it is another network")
        D = tensors["cls_token"].shape[-1]
        depth = len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)})
        blocks = [take_block(tensors, f"blocks.{i}", D) for i in range(depth)]
        position = take_position(tensors, D, SIZE // PATCH)
        return DinoV2(
            take_conv(tensors, "patch_embed.proj", PATCH, PATCH, 3, D),
            take(tensors, "cls_token", 1, 1, D)[0, 0] + position[0],
            position[1:],
            jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
            take_linear(tensors, "norm", D),
        )


def load_dino_s16(path: str | Path) -> DinoV2:
    """The weights of DINO ViT-S/16, as float32 arrays of NumPy, of the official file.

    Raises: BadInput if there is no such file, or it holds another network.
    """
    D = WIDTH_S16
    with expecting(path, f"DINO ViT-S/16, dino_deitsmall16_pretrain.pth, from {URL_S16}"):
        names = [f"blocks.{i}.ls{j}.gamma" for i in range(DEPTH_S16) for j in (1, 2)]
        # Its blocks have no such scales.
        found = open_tensors(path)
        tensors = dict(found) | {name: np.ones(D, np.float32) for name in names}
        blocks = [take_block(tensors, f"blocks.{i}", D) for i in range(DEPTH_S16)]
        position = take_position(tensors, D, SIZE // PATCH_S16)
        weights = DinoV2(
            take_conv(tensors, "patch_embed.proj", PATCH_S16, PATCH_S16, 3, D),
            take(tensors, "cls_token", 1, 1, D)[0, 0] + position[0],
            position[1:],
            jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
            take_linear(tensors, "norm", D),
        )
        # A supervised DeiT-S/16 has the same tensors, and a head.
        layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        layers = [f"blocks.{i}.{layer}" for i in range(DEPTH_S16) for layer in layers]
        layers += ["patch_embed.proj", "norm"]
        known = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        if extra := found.keys() - known - {"cls_token", "pos_embed"}:
            raise BadInput(f"tensor {min(extra)!r} is of another network")
        return weights


def abstract_dino_s16() -> DinoV2:
    """The shapes of the weights of DINO ViT-S/16, of which no file is needed."""
    D, N = WIDTH_S16, DEPTH_S16
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)
    linear = lambda *sides: Linear(shape(*sides), shape(*sides[:-2], sides[-2]))  # type: ignore
    norm, scale = Linear(shape(N, D), shape(N, D)), shape(N, D)  # type: ignore
    return DinoV2(
        Conv(shape(PATCH_S16, PATCH_S16, 3, D), shape(D)),  # type: ignore
        shape(D), shape((SIZE // PATCH_S16) ** 2, D),  # type: ignore
        Block(
            norm, linear(N, 3 * D, D), linear(N, D, D), scale,  # type: ignore
            norm, linear(N, 4 * D, D), linear(N, D, 4 * D), scale,  # type: ignore
        ),
        Linear(shape(D), shape(D)),  # type: ignore
    )  # fmt: skip


def dino_s16(
    weights: DinoV2, image: Float[Array, "B 224 224 3"], dtype: DTypeLike = jnp.float32
) -> list[Float[Array, "B P D"]]:
    """The patches' features of images in [-1, 1]: embedded, and after each quarter of the blocks.

    `dtype` is of activations. Single-device code.
    """
    x = embed(weights, (image + 1) / 2, PATCH_S16, dtype)
    split = lambda leaf: jnp.reshape(leaf, (GROUPS_S16, -1, *leaf.shape[1:]))

    def quarter(x: Array, blocks: Block) -> tuple[Array, Array]:
        x, _ = jax.lax.scan(lambda x, block: (run_block(block, x), None), x, blocks)
        return x, x

    _, found = jax.lax.scan(quarter, x, jax.tree.map(split, weights.blocks))
    return [x[:, 1:], *found[:, :, 1:]]


def take_linear(tensors: Tensors, name: str, *shape: int) -> Linear:
    """A linear layer (out, in), or a layer norm (D,)."""
    return Linear(take(tensors, f"{name}.weight", *shape), take(tensors, f"{name}.bias", shape[0]))


def take_block(tensors: Tensors, at: str, D: int) -> Block:
    """The weights of one block."""
    linear = lambda name, *shape: take_linear(tensors, f"{at}.{name}", *shape)
    return Block(
        linear("norm1", D), linear("attn.qkv", 3 * D, D), linear("attn.proj", D, D),
        take(tensors, f"{at}.ls1.gamma", D),
        linear("norm2", D), linear("mlp.fc1", 4 * D, D), linear("mlp.fc2", D, 4 * D),
        take(tensors, f"{at}.ls2.gamma", D),
    )  # fmt: skip


def take_position(tensors: Tensors, D: int, count: int) -> Float[np.ndarray, "P1 D"]:
    """Position embeddings for `count` patches a side, the class token's first.

    The files of DINOv2 have them for 518 px.
    """
    name = "pos_embed"
    found = tensors[name].shape[1] if name in tensors else 0
    side = int(max(found - 1, 0) ** 0.5)
    position = take(tensors, name, 1, side**2 + 1, D)[0]
    if side == count:
        return position
    matrix = bicubic_matrix(side, count, side / (count + OFFSET))
    grid = position[1:].reshape(side, side, D)
    grid = np.einsum("Hh,hwD,Ww->HWD", matrix, grid, matrix, optimize=True)
    return np.concatenate([position[:1], grid.reshape(-1, D)]).astype(np.float32)


def dinov2(weights: DinoV2, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """The features, the class token's, of images of any size. Single-device code."""
    x = embed(weights, resize_pillow(image, SIZE) / 255, PATCH, jnp.float32)
    x, _ = jax.lax.scan(lambda x, block: (run_block(block, x), None), x, weights.blocks)
    return layer_norm(weights.norm, x[:, :1])[:, 0]


def embed(
    weights: DinoV2, image: Float[Array, "B 224 224 3"], patch: int, dtype: DTypeLike
) -> Float[Array, "B L D"]:
    """The class token, then the patches, of images in [0, 1]."""
    mean, std = (jnp.array(c)[None, None, None] for c in (MEAN, STD))
    x = convolve(weights.patch, ((image - mean) / std).astype(dtype), patch, "VALID")
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + jnp.asarray(weights.position, dtype)[None]
    start = jnp.asarray(weights.start, dtype)[None, None]
    start = jnp.broadcast_to(start, (x.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([start, x], axis=1)


def run_block(block: Block, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Self-attention, then the MLP."""
    B, L, D = x.shape
    qkv = linear(block.qkv, layer_norm(block.norm1, x)).reshape(B, L, 3, -1, HEAD_DIM)
    q, k, v = (qkv[:, :, i] for i in range(3))
    score = jnp.einsum("BLHN,BSHN->BHLS", q * HEAD_DIM**-0.5, k, precision=HIGHEST)
    weight = jax.nn.softmax(score.astype(jnp.float32), axis=-1).astype(x.dtype)
    mixed = jnp.einsum("BHLS,BSHN->BLHN", weight, v, precision=HIGHEST)
    scale1, scale2 = (jnp.asarray(s, x.dtype)[None, None] for s in (block.scale1, block.scale2))
    x = x + scale1 * linear(block.proj, mixed.reshape(B, L, D))
    hidden = jax.nn.gelu(linear(block.fc1, layer_norm(block.norm2, x)), approximate=False)
    return x + scale2 * linear(block.fc2, hidden)


def linear(layer: Linear, x: Float[Array, "B L C"]) -> Float[Array, "B L F"]:
    """A linear layer of torch, whose weight is (out, in), in the dtype of `x`."""
    weight, bias = (jnp.asarray(leaf, x.dtype) for leaf in layer)
    return jnp.einsum("BLC,FC->BLF", x, weight, precision=HIGHEST) + bias[None, None]


def layer_norm(norm: Linear, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """LayerNorm with gain and bias, eps 1e-6, in float32 whatever the dtype of `x`."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return (x * norm.weight[None, None] + norm.bias[None, None]).astype(dtype)
