"""The networks that losses of the tokenizer's training need, which it does not train."""

import jax
import jax.numpy as jnp
from flax import nnx

from var_jax import BadInput
from var_jax.config import TrainTokenizerConfig
from var_jax.models.discriminator import make_discriminator
from var_jax.models.features.dino import (
    SIZE,
    URL_S16,
    abstract_dino_s16,
    dino_s16,
    load_dino_s16,
)
from var_jax.models.features.lpips import abstract_lpips, load_lpips, lpips
from var_jax.schedule import Size, shape_of
from var_jax.tools.flops import matmul_flops
from var_jax.training.task import Frozen


def loss_networks(config: TrainTokenizerConfig) -> Frozen:
    """The frozen networks that the losses of a config need, as arrays of NumPy.

    Raises: BadInput if the file of one is missing or wrong.
    """
    found: Frozen = {}
    if config.steps and config.lpips_weight:
        found["lpips"] = load_lpips("vgg", *filter(None, config.lpips_file.split(",")))
    if config.steps and has_dino(config):
        if not config.gan.dino_file:
            raise BadInput(
                "train_tokenizer.gan.discriminator='dino' needs the weights of DINO ViT-S/16,"
                f" {URL_S16}: name that file as --config.train_tokenizer.gan.dino_file (or take"
                " discriminator=patchgan, which needs none)."
            )
        found["dino"] = load_dino_s16(config.gan.dino_file)
    return found


def abstract_loss_networks(config: TrainTokenizerConfig) -> Frozen:
    """The shapes of `loss_networks`, for which no files are needed."""
    found: Frozen = {"lpips": abstract_lpips("vgg")} if config.lpips_weight else {}
    return found | ({"dino": abstract_dino_s16()} if has_dino(config) else {})


def has_dino(config: TrainTokenizerConfig) -> bool:
    """Whether the discriminator looks at DINO's features."""
    return bool(config.gan.weight) and config.gan.discriminator == "dino"


def loss_flops(config: TrainTokenizerConfig, size: Size) -> float:
    """Operations of the losses' networks for one image of `size` in a step.

    Of frozen networks the forward passes of image and reconstruction and the way back to the
    reconstruction; of trained ones both sides' gradients of activations and weights too.
    """
    networks, key = abstract_loss_networks(config), jax.eval_shape(lambda: jax.random.key(0))
    image, total = jax.ShapeDtypeStruct((1, *shape_of(size), 3), jnp.float32), 0.0
    if config.lpips_weight:
        total += 1.5 * matmul_flops(lpips, networks["lpips"], image, image)
    if config.gan.weight:
        discriminator = jax.eval_shape(
            lambda key: make_discriminator(config.gan, rngs=nnx.Rngs(key)), key
        )
        keys = jax.eval_shape(lambda key: key[None], key)
        call = type(discriminator).__call__
        frozen = 0
        if dino := networks.get("dino"):
            seen = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
            frozen = matmul_flops(dino_s16, dino, seen)
        trained = matmul_flops(call, discriminator, image, keys, dino) - frozen
        total += 3 * frozen + 7 * trained
    return total
