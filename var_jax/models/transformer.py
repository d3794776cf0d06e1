"""The transformer of a config, of whatever kind."""

from flax import nnx

from var_jax.config import TransformerConfig
from var_jax.models.backbone import Backbone
from var_jax.models.dit import DiT
from var_jax.models.raster import Raster
from var_jax.models.var import Transformer

KINDS: dict[str, type[Backbone]] = {"var": Transformer, "raster": Raster, "dit": DiT}


def make_transformer(config: TransformerConfig, *, rngs: nnx.Rngs) -> Backbone:
    """A new transformer. Raises: BadInput if its config does not fit its kind."""
    config.check()
    return KINDS[config.kind](config, rngs=rngs)  # type: ignore[call-arg]
