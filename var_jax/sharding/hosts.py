"""Several hosts as one run: the flags of the commands that can be one of them, and how they end."""

import atexit
import contextlib
import json
import os
import threading
import time
import zlib
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    process_allgather,
    sync_global_devices,
)

from var_jax import BadInput, Failure
from var_jax.tools import ending
from var_jax.tools.files import PATIENCE

PERIOD = 0.5  # between looks at what other hosts say
STOPPING = 60.0  # seconds for all hosts to say where they are
_left = threading.Event()  # set once this process no longer listens to the others


def define_flags() -> None:
    """Defines --distributed, --coordinator, --num_processes and --process_id."""
    flags.DEFINE_bool(
        "distributed", False, "Run as one of several hosts; TPU pods and Slurm set the rank."
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if nothing tells.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: the number of this one, from 0.")


def are_several(args: flags.FlagValues) -> bool:
    """Returns whether the flags speak of several hosts."""
    return args.distributed or args.coordinator is not None


def place(args: flags.FlagValues) -> tuple[int, int]:
    """The number of this host and how many there are, for work that each does by itself.

    With --process_id and --num_processes a host may come and go; else hosts `join` to be counted.

    Raises: BadInput if nothing tells.
    """
    host, count = args.process_id, args.num_processes
    if not are_several(args) or None in (host, count):
        join(args)
        return jax.process_index(), jax.process_count()
    if not 0 <= host < count:
        raise BadInput(f"--process_id={host} of --num_processes={count}; the first one is 0.")
    return host, count


def join(args: flags.FlagValues) -> None:
    """Joins the other processes of a run, if the flags say so; called before anything else of jax.

    From then on all end where one is told to stop, and with the sentence of one that fails.

    Raises: BadInput if nothing tells who they are; Failure if they do not come.
    """
    if not are_several(args):
        if args.num_processes is not None or args.process_id is not None:
            raise BadInput("--num_processes and --process_id need --coordinator or --distributed.")
        return
    # jax's own service hears SIGTERM only, and stops at a step only.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (ValueError, TypeError) as error:
        raise BadInput(f"--distributed: {str(error).strip().splitlines()[0]}") from error
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise Failure(
            f"--distributed: there is no connection to the other hosts ({why})"
        ) from error
    if jax.process_count() > 1:
        _Together().start()


def leave() -> None:
    """Leaves the others for good: from then on no host waits for another, or ends with it."""
    _left.set()
    ending.process.stop_all = ending.process.end_all = None
    jax.distributed.shutdown()


def check_shared(flag: str, folder: str | PurePath) -> None:
    """Raises BadInput, naming `flag`, unless every host sees what process 0 writes in `folder`."""
    folder, first = epath.Path(folder), jax.process_index() == 0
    for left in folder.glob(".shared-*") if first else ():  # by hosts that were killed here
        left.unlink()
    if jax.process_count() == 1:
        return
    name = broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8)).tobytes().hex()
    marker, was_there = folder / f".shared-{name}", folder.exists()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("Each host looks for this file.\n")
    sync_global_devices(f"{name} is written")
    left, blind = PATIENCE, np.arange(jax.process_count())
    while blind.size and left > 0:  # together: a host that waits alone is soon held for lost
        blind = np.flatnonzero(~process_allgather(np.asarray(marker.exists())))
        time.sleep(PERIOD * (blind.size > 0))
        left -= PERIOD
    if first:
        marker.unlink()
        if blind.size and not was_there:
            folder.rmdir()
    if blind.size:
        raise BadInput(
            f"{flag}={folder} is not shared by all hosts: process {blind[0]} does not see what"
            " process 0 writes there; name a folder that all of them mount, or a bucket."
        )


def check_same(what: str, value: Any) -> None:
    """Raises BadInput, saying `what`, unless `value`, JSON-able, is the same on every host."""
    if jax.process_count() == 1:
        return
    digest = zlib.crc32(json.dumps(value, sort_keys=True).encode())
    found = process_allgather(np.uint32(digest)).reshape(-1)
    if (others := np.flatnonzero(found != found[0])).size:
        raise BadInput(
            f"{what} differs on process {others[0]} from what it is on process 0; expected the same"
            " on all hosts."
        )


class _Together:
    """Lets this process end with the others: they write to the key-value store of process 0."""

    def __init__(self):
        from jax._src.distributed import global_state  # jax shows its client nowhere else

        self._client: Any = global_state.client
        self._me, self._count = jax.process_index(), jax.process_count()

    def start(self) -> None:
        """Listens from now on, in a thread."""
        ending.process.stop_all = lambda: self._say("stop", "1")
        ending.process.end_all = lambda code, sentence: self._say(
            "end", json.dumps([code, f"{sentence} (process {self._me} of {self._count})"])
        )
        thread = threading.Thread(target=self.listen, daemon=True)
        thread.start()
        # Ahead of jax's own end, which would make a look fail.
        atexit.register(lambda: (_left.set(), thread.join(4 * PERIOD)))

    def listen(self) -> None:
        """Until this process leaves the others. Should it fail, the process ends: it is deaf."""
        agreed = False
        try:
            while not _left.wait(PERIOD):
                self._heed_end()
                if not agreed and self._heard("stop"):
                    agreed = True
                    self._agree()
        except Exception as error:
            self._leave(1, f"error: {error}")

    def _agree(self) -> None:
        """Finds the point that no host has reached, unless there is one with nothing to lose."""
        with ending.process.lock:
            mine = ending.process.points if ending.process.unsaved else -1
            self._say(f"point/{self._me}", str(mine))
            end = time.monotonic() + STOPPING
            points = [self._point(i, mine, end) for i in range(self._count)]
            if min(points) < 0:
                self._leave(ending.INTERRUPTED, "interrupted")
            ending.process.stop_at = max(points) + 1
        if self._me == 0:
            os.write(2, b"stopping: this step ends, then it saves\n")

    def _point(self, host: int, mine: int, end: float) -> int:
        """Where a host is, asked again where a connection fails. Raises: Failure if it is lost."""
        while True:
            if found := self._heard(f"point/{host}"):
                return int(found)
            if time.monotonic() > end:
                raise Failure(ending.LOST)
            self._heed_end()
            time.sleep(PERIOD / 5)
            self._say(f"point/{self._me}", str(mine))  # once more, should it have got lost

    def _heed_end(self) -> None:
        if said := self._heard("end"):
            self._leave(*json.loads(said))

    def _say(self, key: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):  # another host was first, or process 0 is gone
            self._client.key_value_set(f"var_jax/{key}", value)

    def _heard(self, key: str) -> str:
        try:
            return self._client.key_value_try_get(f"var_jax/{key}")
        except RuntimeError:
            return ""

    def _leave(self, code: int, sentence: str) -> None:
        if not _left.is_set():  # then nothing of the others concerns this process
            time.sleep(4 * PERIOD * (self._me == 0))  # the others hear of it through process 0
            ending.exit_at_once(code, sentence)
