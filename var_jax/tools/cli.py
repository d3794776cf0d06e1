"""How every command starts and ends: flags in, one sentence and exit code 2 on bad input."""

import errno
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags
from absl import logging as absl_logging

from var_jax import BadInput

flags.disclaim_key_flags()  # --help lists those of `sampling_flags` as their command's
BAD_INPUT = 2
OTHER_TYPE = re.compile(
    r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type"
    r" <class '(?:\w+\.)*(\w+)'> .* <class '(?:\w+\.)*(\w+)'>",
    re.DOTALL,
)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it.


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses `sys.argv` and runs `main(argv without flags)`; never returns.

    Wrong flags, `BadInput` and a full disk end in one sentence on stderr and exit code 2, Ctrl-C in
    "interrupted" and 130. Any other exception is a bug and keeps its traceback.
    """
    _quiet_libraries()
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    try:
        return main(argv)
    except BadInput as error:
        return _say(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Exception as error:
        sentence = (
            _disk_full(error) or _memory_full(error) or _unread_config(error) or _bad_path(error)
        )
        if sentence is None:
            raise
        return _say(f"error: {sentence}", BAD_INPUT)


def _parse(argv: list[str]) -> list[str]:
    flags.FLAGS.set_default("verbosity", absl_logging.FATAL)
    flags.FLAGS["verbosity"].using_default_value = False  # absl would raise it to INFO.
    home = os.path.expanduser("~/")  # as in --out=~/samples, which no shell expands
    argv = [re.sub(r"^(--[\w.]+=)~/", lambda flag: flag[1] + home, word) for word in argv]
    try:
        rest = flags.FLAGS(argv)
        for name, flag in flags.FLAGS.flag_values_dict().items():
            if isinstance(flag, float) and not math.isfinite(flag):
                raise BadInput(f"--{name}={flag}; expected a finite number.")
        return rest
    except SystemExit as end:
        if not any(re.match(r"--?help|-\?", word) for word in argv):
            raise  # of a config file
        sys.exit(0 if end.code == 1 else end.code)  # absl ends --help with 1
    except Exception as error:
        sentence = _bad_flag(error)
        if sentence is None:
            raise
        sys.exit(_say(f"error: {sentence}", BAD_INPUT))


def sampling_flags() -> tuple[flags.FlagHolder, flags.FlagHolder, flags.FlagHolder]:
    """Defines --cfg, --top_k and --top_p, which default to what the checkpoint says."""
    say = lambda text: f"{text} Default: the checkpoint's."
    cfg = flags.DEFINE_float("cfg", None, say("Guidance by class; 0: none."), lower_bound=0)
    top_k = flags.DEFINE_integer("top_k", None, say("Draw from the k likeliest codes; 0: all."), 0)
    text = "Draw from this share of probability; 0: all. One number, or one a scale: 1,0.5,0.5."
    return cfg, top_k, flags.DEFINE_list("top_p", None, say(text))


def _bad_flag(error: Exception) -> str | None:
    """The sentence for a user's mistake in the flags; None for a bug, such as in a config file."""
    causes = [link for link in _chain(error) if isinstance(link, BadInput)]
    if causes:  # Raised by a config file; absl and ml_collections wrap it in their own.
        return str(causes[-1])
    for link in _chain(error):  # a config file gave a field a value of another type
        if isinstance(link, TypeError) and (said := OTHER_TYPE.search(str(link))):
            return f"--config: {said[1]}={said[2]} is of type {said[3]}; expected {said[4]}"
    text = " ".join(str(error.args[0] if error.args else error).split())
    text = text.replace("invalid literal for int() with base 10: ", "expected a whole number, not ")
    text = text.replace("could not convert string to float: ", "expected a number, not ")
    if "Error whilst parsing config file" in text:
        return None
    if isinstance(error, flags.Error):
        text = re.sub(r"^flag (--\w+)=None: .*", r"flag \1 is missing; expected a value", text)
        return re.sub(r"\.\s+Did you mean: (.*) \?", r"; did you mean \1?", text)
    # `--config.a.b=v` fails in ml_collections with plain Python errors.
    if not _raised_in(error, "ml_collections"):
        return None
    if not isinstance(error, KeyError | AttributeError):
        return f"--config: {text}"
    meant = re.search(r'Did you mean "(\w+)"', text)
    hint = f"; did you mean {meant[1]!r}?" if meant else ""
    field = re.findall(r"\w+", text)[0]
    return f"--config has no field {field!r}{hint}"


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return code


def _raised_in(error: Exception, package: str) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] == package


def _disk_full(error: BaseException) -> str | None:
    """The sentence for a full disk, whoever wrapped the error; None for other errors."""
    for link in _chain(error):
        text = str(link)
        by_code = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if by_code or re.search(r"No space left on device|Disk quota exceeded", text):
            path = getattr(link, "filename", None)
            if path is None and (found := re.search(r"""["'](/[^"']+)["']""", text)):
                path = found[1]
            # Inside Orbax's temporary folder: name the folder that the user knows.
            known = os.path.dirname(str(path or "").split(".orbax-checkpoint-tmp")[0])
            where = f" holding {known}" if known else ""
            return f"the disk{where} is full; free some space and run the same command again"
    return None


def _memory_full(error: BaseException) -> str | None:
    """The sentence for a program that does not fit in memory; None for other errors."""
    if found := re.search(r"Out of memory allocating (\d+) bytes", str(error)):
        size = f"{int(found[1]) / 1e9:.1f} GB more"
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        size = "more than is free"
    else:
        return None
    return f"memory is full (it takes {size}); a smaller batch size needs less"


def _unread_config(error: Exception) -> str | None:
    """The sentence for a missing --config file, which ml_collections reports on first use."""
    if isinstance(error, OSError) and _raised_in(error, "ml_collections"):
        why = re.sub(r"^\[Errno \d+\] ", "", str(error).strip().splitlines()[-1].strip())
        return f"the config file cannot be read: {why}"
    return None


def _bad_path(error: Exception) -> str | None:
    """The sentence for a path that cannot be what a flag wants; None for other errors."""
    wrong = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    if isinstance(error, OSError) and error.filename and error.strerror:
        if not isinstance(error, wrong) and error.errno != errno.EROFS:
            return None
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return "gs:// folders need one package more: pip install -e '.[gcs]'"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo = [error]
    while todo:
        link = todo.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [*getattr(link, "exceptions", ()), link.__cause__, link.__context__]


def _quiet_libraries() -> None:
    """Keeps a user's terminal to our own output; what matters arrives as an exception anyway."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "grain", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def no_arguments(argv: list[str]) -> None:
    """Raises BadInput for a word that is no flag."""
    if len(argv) > 1:
        raise BadInput(f"unexpected argument {argv[1]!r}; every option is a --flag.")
