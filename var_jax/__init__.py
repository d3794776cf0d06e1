"""VAR, image generation by next-scale prediction (arXiv 2404.02905), in JAX."""

__version__ = "0.1.0"


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one sentence they can act on.

    Commands print it to stderr and exit with code 2 (see `tools/cli.py`). It names the flag, field,
    file or tensor, what was found and what was expected.
    """
