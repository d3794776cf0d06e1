"""How a process ends: by a signal, with its work saved; by a failure, and with it the other hosts.

Ctrl-C, SIGTERM and SIGHUP ask for the same. Where a stop would lose work (`unsaved`) the process
goes on to its next `stop_requested`; elsewhere it ends within seconds, also inside a compiler,
which runs no Python. A second Ctrl-C ends it at once, and so does any signal that comes
`GRACE` after the first: who stops a process may send several together.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells have it, whichever signal it was
SIGNALS = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
LOST = "another host is lost; the same command goes on from the newest checkpoint"
GRACE = 5.0  # that a process has to end by itself


@dataclasses.dataclass
class Process:
    """What is known of this process; `hosts` fills in what concerns the others of a run."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    listens: bool = False
    starting: bool = False  # while a command is imported, which holds nothing yet
    log: Any = None  # a path for the traceback of a failure, once there is a work directory
    unsaved: bool = False  # a stop waits for the next point
    points: int = 0  # passed, at which it could stop: as many at the same place on every host
    stop_at: int | None = None  # the first of them to stop at
    stop_all: Callable[[], None] | None = None  # asks every host to stop
    end_all: Callable[[int, str], None] | None = None  # ends every host


process = Process()


def stop_requested() -> bool:
    """Whether to save and stop here: the same answer on every host, whichever was signalled."""
    with process.lock:
        process.points += 1
        return process.stop_at is not None and process.points >= process.stop_at


@contextlib.contextmanager
def unsaved(is_so: bool = True) -> Iterator[None]:
    """Around work that a stop must not lose; inside it, `unsaved(False)` around what it may."""
    with process.lock:
        before, process.unsaved = process.unsaved, is_so
    try:
        yield
    finally:
        with process.lock:
            process.unsaved = before


def end(code: int, sentence: str) -> NoReturn:
    """Ends this process and the other hosts of its run, whatever they are at."""
    if process.end_all:
        process.end_all(code, sentence)
        threading.Event().wait(4 * GRACE)  # it ends as the others do, when it hears of it
    exit_at_once(code, sentence)


def exit_at_once(code: int, sentence: str = "") -> NoReturn:
    """Ends this process without waiting for its threads."""
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode() if sentence else b"")  # print could wait for a lock
    os._exit(code)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Hears signals until its end; where that is heard already, or is another's task, nothing."""
    main = threading.current_thread() is threading.main_thread()
    if process.listens or not main:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = threading.Thread(target=_hear, args=(reader,), daemon=True)
    process.listens, process.stop_at = True, None
    numbers = [n for n in SIGNALS if (n and signal.getsignal(n) != signal.SIG_IGN) or n == 2]
    handlers = {number: signal.signal(number, _handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    heard.start()
    try:
        yield
    finally:
        if not sys.is_finalizing():  # else Python ended the thread, and join would wait for ever
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            process.listens = False
            os.close(writer)
            heard.join()
            os.close(reader)


_from_the_start = listening()  # kept, as its end would be the end of listening


def is_command(argv: list[str], whole: list[str]) -> bool:
    """Whether `python -m` is looking for a command of ours, whose imports take seconds.

    Then `argv` begins with -m; `whole` is the command line, as another program's -m may import us.
    """
    if argv[:1] != ["-m"] or "-m" not in whole[:-1]:
        return False
    return whole[whole.index("-m") + 1].partition(".")[0] == "var_jax"


def listen_from_the_start() -> None:
    """Hears signals from the imports of a command to the end of its process.

    Tells of a variable of the environment that these imports fail for.
    """
    _from_the_start.__enter__()
    process.starting = True
    sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends with a sentence where jax refuses a variable, else with the traceback."""
    from var_jax.tools.settings import refused_variable  # later than this module

    if sentence := refused_variable(error):
        exit_at_once(2, f"error: {sentence}")
    sys.__excepthook__(kind, error, trace)


def _handle(number: int, frame: object) -> None:
    """In the main thread, once it runs Python again."""
    if process.starting:
        exit_at_once(INTERRUPTED, "interrupted")
    if process.stop_all is None:
        if not process.unsaved:
            raise KeyboardInterrupt
        process.stop_at = 0


def _hear(reader: int) -> None:
    """In a thread of its own: hears a signal at once, whatever the main thread is at."""
    signals: list[int] = []
    first, last = 0.0, None
    while byte := os.read(reader, 1):
        if byte[0] not in SIGNALS:
            continue
        signals.append(byte[0])
        first = first or time.monotonic()
        if signals.count(signal.SIGINT) > 1 or time.monotonic() - first > GRACE:
            end(INTERRUPTED, "interrupted")
        elif len(signals) > 1:
            continue
        elif process.stop_all:
            process.stop_all()
        elif process.unsaved:
            os.write(2, b"stopping: this step ends, then it saves\n")
        else:
            last = threading.Timer(GRACE, exit_at_once, (INTERRUPTED, "interrupted"))
            last.daemon = True
            last.start()
    if last:
        last.cancel()
