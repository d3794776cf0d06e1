"""How every command starts and ends: flags in, one sentence and exit code 2 on bad input."""

import errno
import faulthandler
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging

from var_jax import BadInput
from var_jax.tools.configs import did_you_mean

Main = Callable[[flags.FlagValues], None]
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it.


def run(main: Main, define_flags: Callable[[], None]) -> NoReturn:
    """Runs a command with the flags of `sys.argv`; never returns.

    Bad input and a full disk end in one sentence on stderr and exit code 2, Ctrl-C in "interrupted"
    and 130. Any other exception is a bug and keeps its traceback.
    """
    faulthandler.enable()
    _quiet_libraries()
    _cache_compiled_programs()
    sys.exit(call(main, define_flags, sys.argv[1:]))


def call(main: Main, define_flags: Callable[[], None], argv: Sequence[str] = ()) -> int:
    """Runs a command inside this process with the flags `argv`; returns its exit code.

    Its flags exist only meanwhile, so that commands can run one after another. Ends like `run`.
    """
    args, code, message = flags.FLAGS, 0, ""
    before, was_parsed = set(args), args.is_parsed()
    try:
        define_flags()
        if any(re.match(r"--?h(elp|$)", word) for word in argv):
            print(_help(main, [name for name in args if name not in before]))
        else:
            _parse(args, argv)
            main(args)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        code, message = BAD_INPUT, f"error: {sentence}"
    finally:
        for name in set(args) - before:
            delattr(args, name)
        if not was_parsed:
            args.unparse_flags()
    if message:
        print(message, file=sys.stderr, flush=True)
    return code


def define_config_flag() -> None:
    """Defines --config and --config_field, for `configs.load_config`."""
    flags.DEFINE_string(
        "config",
        None,
        "NAME[:VARIANT] of a config in the package, or its path. --config.a.b=v changes a field.",
        required=True,
    )
    flags.DEFINE_multi_string("config_field", [], "The long form of --config.a.b=v: a.b=v.")


def define_sampling_flags() -> None:
    """Defines --cfg, --top_k and --top_p, which default to what the checkpoint says."""
    say = lambda text: f"{text} Default: the checkpoint's."
    flags.DEFINE_float("cfg", None, say("Guidance scale; 0: none."), lower_bound=0)
    flags.DEFINE_integer("top_k", None, say("Sample from the k likeliest codes; 0: all."), 0)
    text = "Sample from this share of probability; 0: all. One number, or one a scale: 1,0.5,0.5."
    flags.DEFINE_list("top_p", None, say(text))


def numbers(name: str, words: list[str] | None) -> tuple[float, ...] | None:
    """A list flag as numbers. Raises: BadInput, naming the flag, for anything else."""
    if words is None:
        return None
    try:
        return tuple(map(float, words))
    except ValueError as error:
        raise BadInput(f"{name}={','.join(words)}; expected numbers.") from error


def _parse(args: flags.FlagValues, argv: Sequence[str]) -> None:
    home = os.path.expanduser("~/")  # as in --out=~/samples, which no shell expands
    words = [re.sub(r"^(--[\w.]+=)~/", lambda flag: flag[1] + home, word) for word in argv]
    words = [re.sub(r"^--config\.", "--config_field=", word) for word in words]
    for i in reversed(range(len(words) - 1)):  # --config.a.b v
        if re.fullmatch(r"--config_field=[\w.]+", words[i]) and not words[i + 1].startswith("--"):
            words[i : i + 2] = [f"{words[i]}={words[i + 1]}"]
    try:
        rest = args(["", *words])
    except flags.UnrecognizedFlagError as error:
        near = did_you_mean(error.flagname, args)
        raise BadInput(f"unknown flag --{error.flagname}{near}") from error
    except flags.Error as error:
        text = str(error).splitlines()[0]  # of several the first
        text = re.sub(r"=None: .*", " is missing; expected a value", text)
        text = re.sub(r"invalid literal for int\(\).*?:", "expected a whole number, not", text)
        text = text.replace("could not convert string to float:", "expected a number, not")
        raise BadInput(text) from error
    if len(rest) > 1:
        raise BadInput(f"unexpected argument {rest[1]!r}; every option is a --flag.")
    for name, value in args.flag_values_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{name}={value}; expected a finite number.")


def _help(main: Main, names: list[str]) -> str:
    """What the command's module says it does, and its flags."""
    ours = flags.FlagValues()
    for name in names:
        ours[name] = flags.FLAGS[name]
    return f"{sys.modules[main.__module__].__doc__}\n{ours.get_help(include_special_flags=False)}"


def _sentence(error: Exception) -> str | None:
    """The sentence for bad input or a full disk; None for a bug."""
    if isinstance(error, BadInput):
        return str(error)
    return _disk_full(error) or _memory_full(error) or _bad_path(error)


def _disk_full(error: Exception) -> str | None:
    # Libraries wrap what the system said; without frames this is the text of all in the chain.
    text = "".join(traceback.format_exception(error, limit=0))
    if not (found := re.search(r".*(No space left on device|Disk quota exceeded).*", text)):
        return None
    path = re.search(r"""["']([^"']*/[^"']+)["']""", found[0])
    # Inside Orbax's temporary folder: name the folder that the user knows.
    known = os.path.dirname(path[1].split(".orbax-checkpoint-tmp")[0]) if path else ""
    where = f" holding {known}" if known else ""
    return f"the disk{where} is full; free some space and run the same command again"


def _memory_full(error: BaseException) -> str | None:
    if found := re.search(r"Out of memory allocating (\d+) bytes", str(error)):
        size = f"{int(found[1]) / 1e9:.1f} GB more"
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        size = "more than is free"
    else:
        return None
    return f"memory is full (it takes {size}); a smaller batch size needs less"


def _bad_path(error: Exception) -> str | None:
    wrong = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    if isinstance(error, OSError) and error.filename and error.strerror:
        if not isinstance(error, wrong) and error.errno != errno.EROFS:
            return None
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return "gs:// folders need one package more: pip install 'var_jax[gcs]'"
    return None


def _quiet_libraries() -> None:
    """Keeps a user's terminal to our own output; what matters arrives as an exception anyway."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "grain", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _cache_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a command that starts again compiles nothing twice.

    In ~/.cache/var_jax, or where JAX_COMPILATION_CACHE_DIR says; an empty value turns it off.
    """
    import jax  # most commands have it already; --help of others need not

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "var_jax"))
