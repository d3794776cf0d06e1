"""VAR, image generation by next-scale prediction (arXiv 2404.02905), in JAX.

import var_jax
model = var_jax.load("emoji")
model.sample(["Flags", "Animals & Nature"], seed=0)
"""

import sys
from typing import TYPE_CHECKING, Any

from var_jax.tools import ending

if TYPE_CHECKING:
    from var_jax.api import Images, Model, load

__version__ = "0.1.0"
__all__ = ["BadInput", "Failure", "Images", "Model", "load"]

if ending.is_command(sys.argv, sys.orig_argv):
    ending.listen_from_the_start()


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one sentence they can act on.

    Commands print it to stderr and exit with code 2 (see `tools/cli.py`). It names the flag, field,
    file or tensor, what was found and what was expected.
    """


class Failure(RuntimeError):
    """Something else went wrong, which may go right another time; the message is one sentence.

    Commands print it to stderr, keep the traceback in a file, and exit with code 1.
    """


def __getattr__(name: str) -> Any:
    """Imports the library where it is used, so that commands answer --help at once."""
    if name in __all__:
        from var_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'var_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
