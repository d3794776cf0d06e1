"""Functions that users name in flags and configs."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from var_jax import BadInput


def find_function(name: str, spec: str, arguments: int) -> Callable[..., Any]:
    """The function MODULE:FUNCTION of so many arguments.

    Raises: BadInput, naming the setting, if there is none.
    """
    module, _, attribute = spec.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"{name}={spec} is no MODULE:FUNCTION here ({error}).") from error
    except (Exception, SystemExit) as error:  # whatever the module does
        raise BadInput(f"{name}={spec} cannot be imported: {describe(error)}.") from error
    if not callable(found):
        raise BadInput(f"{name}={spec} is no function.")
    try:
        inspect.signature(found).bind(*range(arguments))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name}={spec} cannot be called with {arguments} arguments.") from error
    return found


def describe(error: BaseException) -> str:
    """What a user's code raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")
