"""How every command starts and ends: flags in; one sentence and an exit code out."""

import contextlib
import errno
import faulthandler
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging

from var_jax import BadInput, Failure
from var_jax.tools import ending
from var_jax.tools.buckets import check_buckets
from var_jax.tools.configs import did_you_mean
from var_jax.tools.files import DISK_FULL, cache_folder, output_path, release_locks
from var_jax.tools.settings import pin_settings, refused_variable
from var_jax.tools.streams import keep_streams_open

Main = Callable[[flags.FlagValues], None]
FAILED, BAD_INPUT = 1, 2
COMPILES = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring: begin and end
SILENT = 10.0  # seconds of compiling of which nothing is said
# What a path can be wrong in, where the user named it.
WRONG_PATHS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def run(main: Main, define_flags: Callable[[], None]) -> NoReturn:
    """Runs a command with the flags of `sys.argv`; never returns.

    The exit code is 2 for what the user gave, and only then: the same command would be refused
    again. It is 1 for any other failure and 130 after Ctrl-C, SIGTERM and SIGHUP. All end in one
    sentence on stderr, and on all hosts of a run; a failure keeps its traceback in a file, and one
    of no known kind is a bug that prints it.
    """
    keep_streams_open()
    faulthandler.enable()
    _quiet_libraries()
    ending.process.starting = False
    try:
        with ending.listening():
            _tell_compilations(_cache_compiled_programs())
            code = call(main, define_flags, sys.argv[1:], pin=True)
    except KeyboardInterrupt:  # amid the end
        code = ending.INTERRUPTED
    except Exception as error:
        if not ending.process.end_all:
            raise
        traceback.print_exc()
        ending.end(FAILED, f"error: {type(error).__name__}: {error}")
    if code == ending.INTERRUPTED and not ending.process.end_all:
        ending.exit_at_once(code)  # Python's own end would wait for XLA, or take it apart at work
    sys.exit(code)


def call(
    main: Main,
    define_flags: Callable[[], None],
    argv: Sequence[str] = (),
    *,
    pin: bool = False,
) -> int:
    """Runs a command inside this process with the flags `argv`; returns its exit code.

    Its flags exist only meanwhile, so that commands can run one after another. Ends like `run`,
    which has it `pin` settings of jax for the whole process.
    """
    args, code, message = flags.FLAGS, 0, ""
    before, was_parsed = set(args), args.is_parsed()
    ending.process.log = None
    try:
        if pin:
            pin_settings()
        define_flags()
        if any(re.match(r"--?h(elp|$)", word) for word in argv):
            print(_help(main, [name for name in args if name not in before]))
        else:
            _parse(args, argv)
            check_buckets(argv)
            main(args)
    except KeyboardInterrupt:
        code, message = ending.INTERRUPTED, "interrupted"
    except Exception as error:
        code, sentence = explain(error, argv)
        if not sentence:
            raise
        if code == FAILED:
            sentence = f"{sentence.rstrip('.')}; {_keep_traceback(error)}"
        message = f"error: {sentence}"
    finally:
        release_locks()
        for name in set(args) - before:
            delattr(args, name)
        if not was_parsed:
            args.unparse_flags()
    if message:
        if code != ending.INTERRUPTED and ending.process.end_all:
            ending.end(code, message)
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


def numbers(name: str, words: list[str] | None) -> tuple[float, ...] | None:
    """A list flag as numbers. Raises: BadInput, naming the flag, for anything else."""
    if words is None:
        return None
    try:
        if not words:
            raise ValueError("an empty list")
        return tuple(map(float, words))
    except ValueError as error:
        raise BadInput(f"{name}={','.join(words)}; expected numbers.") from error


def _parse(args: flags.FlagValues, argv: Sequence[str]) -> None:
    words = [re.sub(r"^--config\.", "--config_field=", word) for word in argv]
    for i in reversed(range(len(words) - 1)):  # --config.a.b v
        if re.fullmatch(r"--config_field=[\w.]+", words[i]) and not words[i + 1].startswith("--"):
            words[i : i + 2] = [f"{words[i]}={words[i + 1]}"]
    words = _spread(words, args)
    try:
        rest = args(["", *words])
    except flags.UnrecognizedFlagError as error:
        near = did_you_mean(error.flagname, args)
        raise BadInput(f"unknown flag --{error.flagname}{near}") from error
    except (flags.Error, ValueError) as error:  # absl itself: --nosmooth=3
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


def _spread(words: Sequence[str], args: flags.FlagValues) -> list[str]:
    """`--runs A B`, as a shell expands `--runs runs/*`, as `--runs=A --runs=B`."""
    found, several = [], ""
    for word in words:
        name = word.lstrip("-")
        if word.startswith("-"):
            is_multi = "=" not in name and name in args and isinstance(args[name], flags.MultiFlag)
            several = f"--{name}" if is_multi else ""
            found += [] if several else [word]
        else:
            found.append(f"{several}={word}" if several else word)
    return found


def _help(main: Main, names: list[str]) -> str:
    """What the command's module says it does, and its flags."""
    ours = flags.FlagValues()
    for name in names:
        ours[name] = flags.FLAGS[name]
    about = sys.modules[main.__module__].__doc__ or ""  # -OO leaves none
    return f"{about}\n{ours.get_help(include_special_flags=False)}"


def explain(error: Exception, argv: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and sentence of what ended a command; the sentence of a bug is empty."""
    if isinstance(error, BadInput):
        return BAD_INPUT, str(error)
    # Libraries wrap what the system said; without frames this is the text of all in the chain.
    text = "".join(traceback.format_exception(error, limit=0))
    if lines := [line for line in text.splitlines() if re.search(DISK_FULL, line)]:
        return FAILED, _disk_full("\n".join(lines), argv)
    if sentence := _memory_full(error, text):
        return FAILED, sentence
    if found := _no_device(error):
        return found
    if sentence := refused_variable(error):
        return BAD_INPUT, sentence
    if ending.process.end_all and re.search("Gloo|by peer|heartbeat|coordination", text):
        return FAILED, ending.LOST
    if isinstance(error, Failure):
        return FAILED, str(error)
    if type(error).__module__.startswith(("gcsfs", "aiohttp", "google")):  # a bucket in trouble
        return FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OSError):
        return _bad_path(error, argv)
    return FAILED, ""


def _disk_full(lines: str, argv: Sequence[str]) -> str:
    path = re.search(r"""["']([^"'\n]*/[^"'\n]+)["']""", lines)
    # Inside Orbax's temporary folder: name the folder that the user knows.
    known = os.path.dirname(path[1].split(".orbax-checkpoint-tmp")[0]) if path else ""
    if not known:  # what writes to an open file does not know its name
        places = [*(word.rpartition("=")[2] for word in argv), tempfile.gettempdir()]
        known = next((place for place in places if _is_full(place)), "")
    where = f" holding {known}" if known else ""
    return f"the disk{where} is full; free some space and run the same command again"


def _is_full(place: str) -> bool:
    """Returns whether there is a file or folder of that name on a disk with no space left."""
    return os.path.exists(place) and shutil.disk_usage(place).free < 2**16


def _memory_full(error: Exception, text: str) -> str:
    if "RESOURCE_EXHAUSTED" in text and re.search("(?i)quota|rate limit", text):
        return "a quota of the cloud is used up; run the same command again later"
    if found := re.search(r"Out of memory allocating (\d+) bytes", text):
        size = f"{int(found[1]) / 1e9:.1f} GB more"
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        size = "more than is free"
    else:
        return ""
    return f"memory is full (it takes {size}); a smaller batch size needs less"


def _no_device(error: Exception) -> tuple[int, str] | None:
    """2 for a platform that this jax does not know, 1 where one it knows could not start."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.filename.endswith("xla_bridge.py") for frame in frames[-3:]):
        return None
    if "Could not determine process_index" in str(error):  # jax looks for it on the first device
        return BAD_INPUT, "JAX_NUM_CPU_DEVICES or XLA_FLAGS asks for 0 devices; it takes 1 or more."
    wanted = os.environ.get("JAX_PLATFORMS", "")
    why = re.sub(r" \(set JAX_PLATFORMS.*", "", str(error)) or "it is not known to this jax"
    unknown = "not known to this jax|^Unknown backend|is not in the list of known backends"
    code = BAD_INPUT if re.search(unknown, why) else FAILED
    why = why.rstrip(".")
    if not wanted:
        return code, f"no device could be started ({why})"
    return code, f"JAX_PLATFORMS={wanted}: no such device could be started ({why})"


def _bad_path(error: OSError, argv: Sequence[str]) -> tuple[int, str]:
    """2 for a path that a flag names, or one on the way to it, before the work has begun."""
    if not error.strerror:
        return FAILED, f"{type(error).__name__}: {error}"
    try:
        path = os.path.abspath(os.fsdecode(error.filename or ""))
    except FileNotFoundError:
        return BAD_INPUT, "the folder that this command was started in is gone"
    named = [os.path.abspath(word.rpartition("=")[2]) for word in argv if word]
    related = any(os.path.commonpath([path, name]) in (path, name) for name in named)
    theirs = isinstance(error, WRONG_PATHS) or error.errno == errno.EROFS
    bad_input = theirs and error.filename and related and ending.process.log is None
    where = f"{error.filename}: " if error.filename else ""
    return BAD_INPUT if bad_input else FAILED, f"{where}{error.strerror.lower()}"


def _keep_traceback(error: Exception) -> str:
    """Writes a failure's traceback to the work directory, or else among temporary files."""
    text = "".join(traceback.format_exception(error))
    temporary = Path(tempfile.gettempdir()) / f"var_jax-error-{os.getpid()}.log"
    for path in filter(None, (ending.process.log, temporary)):
        with contextlib.suppress(Exception):
            path.write_text(text)
            return f"the traceback is in {path}"
    print(text, file=sys.stderr)
    return "its traceback is above"


def _quiet_libraries() -> None:
    """Keeps a user's terminal to our own output; what matters arrives as an exception anyway."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "grain", "matplotlib", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _cache_compiled_programs() -> str:
    """Keeps compiled programs on disk, so that a command that starts again compiles nothing twice.

    In ~/.cache/var_jax, or where JAX_COMPILATION_CACHE_DIR says; an empty value turns it off.
    Returns that folder, or "" where nothing is kept.
    """
    import jax  # most commands have it already; --help of others need not

    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_folder())):
        try:
            cache = str(output_path(cache))
        except BadInput:  # no home, or no right to write there: nothing is kept
            cache = None
        jax.config.update("jax_compilation_cache_dir", cache)
    return cache or ""


def _tell_compilations(cache: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Says on stderr what is being compiled, once that lasts ten seconds: it may take minutes.

    Returns what jax calls at the begin and the end of each compilation; `cache` is where programs
    are kept.
    """
    import jax.monitoring
    from tqdm import tqdm

    waiting: dict[int, threading.Timer] = {}  # by the thread that compiles

    def begin(event: str, value: float, **about: str | int) -> None:
        if event == COMPILES and jax.process_index() == 0:
            where = re.sub(f"^{re.escape(os.path.expanduser('~'))}/", "~/", cache)
            kept = f"; it is kept in {where} for the next start" if cache else ""
            name = re.sub(r"^jit[_(]|\)$", "", str(about.get("fun_name", "")))
            line = f"compiling {name}{kept}"
            timer = threading.Timer(SILENT, tqdm.write, (line,), {"file": sys.stderr})
            timer.daemon = True
            timer.start()
            waiting[threading.get_ident()] = timer

    def end(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILES and (timer := waiting.pop(threading.get_ident(), None)):
            timer.cancel()

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)
    return begin, end
