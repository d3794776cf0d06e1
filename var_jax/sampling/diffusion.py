"""Sampling from the diffusion transformer: noise → latent along its flow, in one jitted program."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, UInt8

from var_jax import BadInput
from var_jax.config import SamplingConfig
from var_jax.sampling.autoregressive import Weights, pairs, to_images, unpaired
from var_jax.sampling.guidance import guide
from var_jax.schedule import shape_of
from var_jax.sharding.mesh import BATCH
from var_jax.sharding.ops import reshape, reshard

Velocity = Callable[[Float[Array, "B *x"], Float[Array, ""]], Float[Array, "B *x"]]


@functools.partial(jax.jit, static_argnames=("steps", "solver"))
def sample(
    weights: Weights,
    labels: Int32[Array, " B"],
    keys: Key[Array, " B"],
    known: None = None,
    *,
    cfg: Float[Array, ""] | float | None = 1.5,
    steps: int = 50,
    solver: str = "heun",
) -> tuple[UInt8[Array, "B H W 3"], None]:
    """Images, under guidance `cfg`, the same at all times; there are no tokens.

    A label of num_classes means "no class". Without guidance (None) the work is halved.
    """
    dit = weights.transformer
    shape = *shape_of(dit.config.patch_nums[-1]), dit.config.latent_dim
    if cfg is not None:
        labels = pairs(labels, jnp.full_like(labels, dit.config.num_classes))

    def velocity(x, time):
        x = x if cfg is None else pairs(x, x)
        v = dit(labels, x, jnp.broadcast_to(time, labels.shape))
        if cfg is not None:
            v = guide(*unpaired(v), cfg)
        return reshape(v, len(keys), *shape)

    draw = lambda key: jax.random.normal(key, shape)
    noise = reshard(jax.vmap(draw)(keys), BATCH)
    latent = dit.statistics.denormalize(solve(velocity, noise, steps, solver))
    return to_images(weights, latent), None


def solve(
    velocity: Velocity, noise: Float[Array, "B *x"], steps: int, solver: str
) -> Float[Array, "B *x"]:
    """The end at time 0 of dx/dt = velocity(x, t) that begins with noise at time 1.

    euler takes one evaluation a step, its error falls with 1 / steps; heun takes two, 1 / steps².
    """

    def step(x, i):
        now, then = 1 - i / steps, 1 - (i + 1) / steps
        v = velocity(x, now)
        if solver == "heun":
            v = (v + velocity(x - v / steps, then)) / 2
        return x - v / steps, None

    return jax.lax.scan(step, noise, jnp.arange(steps, dtype=jnp.float32))[0]


def sampler(settings: SamplingConfig, smooth: bool = False) -> functools.partial:
    """`sample` with these settings, as `generate` takes it. Raises: BadInput for `smooth`."""
    if smooth:
        raise BadInput("smooth sampling mixes codes; a dit has none.")
    options = {"cfg": settings.cfg or None, "steps": settings.steps, "solver": settings.solver}
    return functools.partial(sample, **options)
