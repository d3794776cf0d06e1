"""Settings of jax and flax that numbers depend on, at their defaults whatever the environment."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from var_jax import BadInput

OF_JAX = {
    "jax_allow_f16_reductions": True,
    "jax_debug_infs": False,
    "jax_debug_nans": False,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_enable_x64": False,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_softmax_custom_jvp": False,
    "jax_threefry_partitionable": True,
}
OF_FLAX = {"nnx_graph_mode": True, "nnx_graph_updates": True}
OF_LIBRARIES = ("NVIDIA_TF32_OVERRIDE",)
OF_XLA = r"--(xla_\w*(?:fast_m|excess_precision|optimization_level|disable_\w*passes)\w*)"


def pin_settings() -> None:
    """Pins them for this process, and says on stderr which of the environment are not used.

    Raises: BadInput if XLA_FLAGS changes arithmetic; what jax read of it cannot be changed.
    """
    import flax
    import jax

    if found := re.search(OF_XLA, os.environ.get("XLA_FLAGS", "")):
        raise BadInput(f"XLA_FLAGS holds --{found[1]}, which changes all numbers; unset it.")
    unused = [name for name in OF_LIBRARIES if os.environ.pop(name, None)]
    for config, settings in ((jax.config, OF_JAX), (flax.config, OF_FLAX)):
        for name, value in settings.items():
            if getattr(config, name, value) != value:
                config.update(name, value)
                unused.append(name.upper())
    if unused:
        print(f"not used, as results would be others: {', '.join(unused)}", file=sys.stderr)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Pins, inside a `with`, what a program may have set for itself around a call of the library.

    A context manager.
    """
    import jax

    with (
        jax.default_prng_impl(OF_JAX["jax_default_prng_impl"]),
        jax.threefry_partitionable(True),
        jax.enable_x64(False),
        jax.default_matmul_precision(None),
    ):
        yield
