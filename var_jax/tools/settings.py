"""Settings of jax and flax that numbers depend on, at their defaults whatever the environment."""

import contextlib
import os
import re
import sys
import traceback
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
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_high_dynamic_range_gumbel": False,
    "jax_no_execution": False,
    "jax_no_tracing": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_softmax_custom_jvp": False,
    "jax_threefry_partitionable": True,
    **dict.fromkeys(
        (
            "jax_transfer_guard",
            "jax_transfer_guard_device_to_device",
            "jax_transfer_guard_device_to_host",
            "jax_transfer_guard_host_to_device",
        ),
        None,
    ),
}
NOT_PINNED = ("jax_random_seed_offset", "jax_high_dynamic_range_gumbel")  # inside a program
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


def refused_variable(error: BaseException) -> str:
    """A sentence on the JAX_* variable whose value jax refused with `error`; "" for other errors.

    jax reads these variables while it is imported; its messages hold the name or else the value.
    """
    frames = traceback.extract_tb(error.__traceback__)
    importing = any(
        f.name == "<module>" and f"{os.sep}jax{os.sep}_src" in f.filename for f in frames
    )
    if not importing or not isinstance(error, ValueError):
        return ""
    given = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    text = " ".join(str(error).split())
    calls = lambda name: name.lower().replace("jax_", r"\bjax[_.]", 1) + r"\b"
    named = [name for name in given if re.search(calls(name), text, re.IGNORECASE)]
    named = named or [name for name, value in given.items() if repr(value) in text]
    what = ", ".join(f"{name}={given[name]}" for name in named)
    return f"{what}: jax refuses this value ({text}); correct it or unset it." if named else ""


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Pins, inside a `with`, what a program may have set for itself around a call of the library.

    A context manager. Raises: BadInput for a setting that changes numbers and cannot be pinned.
    """
    import jax

    for name in NOT_PINNED:
        if (value := getattr(jax.config, name, OF_JAX[name])) != OF_JAX[name]:
            raise BadInput(
                f"{name}={value} gives other images; jax.config.update({name!r}, {OF_JAX[name]})"
                " first."
            )
    with (
        jax.transfer_guard("allow"),
        jax.default_prng_impl(OF_JAX["jax_default_prng_impl"]),
        jax.threefry_partitionable(True),
        jax.enable_x64(False),
        jax.default_matmul_precision(None),
    ):
        yield
