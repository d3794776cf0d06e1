"""Several hosts as one run: the flags of the commands that can be one of them, and how they end."""

import atexit
import contextlib
import json
import os
import threading
import time
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

SECONDS = 0.5  # between looks at what other hosts say
_left = threading.Event()  # set once this process no longer listens to the others


def define_flags() -> None:
    """Defines --distributed, --coordinator, --num_processes and --process_id."""
    flags.DEFINE_bool(
        "distributed", False, "One of several hosts: TPU pods, Slurm and the like tell which."
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
        _end_together()


def leave() -> None:
    """Leaves the others for good: from then on no host waits for another, or ends with it."""
    _left.set()
    ending.process.stop_all = ending.process.end_all = None
    jax.distributed.shutdown()


def check_shared(flag: str, folder: str | PurePath) -> None:
    """Raises BadInput, naming `flag`, unless every host sees what process 0 writes in `folder`."""
    if jax.process_count() == 1:
        return
    folder, first = epath.Path(folder), jax.process_index() == 0
    name = broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8)).tobytes().hex()
    marker, was_there = folder / f".shared-{name}", folder.exists()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("Each host looks for this file.\n")
    sync_global_devices(f"{name} is written")
    left, blind = PATIENCE, np.arange(jax.process_count())
    while blind.size and left > 0:  # together: a host that waits alone is soon held for lost
        blind = np.flatnonzero(~process_allgather(np.asarray(marker.exists())))
        time.sleep(SECONDS * (blind.size > 0))
        left -= SECONDS
    if first:
        marker.unlink()
        if blind.size and not was_there:
            folder.rmdir()
    if blind.size:
        raise BadInput(
            f"{flag}={folder} is not shared by all hosts: process {blind[0]} does not see what"
            " process 0 writes there; name a folder that all of them mount, or a bucket."
        )


def _end_together() -> None:
    """Lets this process end with the others: they write to the key-value store of process 0."""
    from jax._src.distributed import global_state  # jax shows its client nowhere else

    client: Any = global_state.client
    me, count = jax.process_index(), jax.process_count()

    def say(key: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):  # another host was first, or process 0 is gone
            client.key_value_set(f"var_jax/{key}", value)

    def heard(key: str) -> str:
        try:
            return client.key_value_try_get(f"var_jax/{key}")
        except RuntimeError:
            return ""

    def leave(code: int, sentence: str) -> None:
        time.sleep(4 * SECONDS * (me == 0))  # the others hear of it through process 0
        ending.leave(code, sentence)

    def agree() -> None:
        """Finds the point that no host has reached, unless there is one with nothing to lose."""
        with ending.process.lock:
            mine = ending.process.points if ending.process.unsaved else -1
            say(f"point/{me}", str(mine))
            wait = 60_000  # ms
            get = client.blocking_key_value_get
            points = [int(get(f"var_jax/point/{i}", wait)) for i in range(count)]
            if min(points) < 0:
                leave(ending.INTERRUPTED, "interrupted")
            ending.process.stop_at = max(points) + 1
        if me == 0:
            os.write(2, b"stopping: this step ends, then it saves\n")

    def listen() -> None:
        agreed = False
        while not _left.wait(SECONDS):
            if said := heard("end"):
                leave(*json.loads(said))
            if not agreed and heard("stop"):
                agreed = True
                agree()

    ending.process.stop_all = lambda: say("stop", "1")
    ending.process.end_all = lambda code, sentence: say(
        "end", json.dumps([code, f"{sentence} (process {me} of {count})"])
    )
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    # Ahead of jax's own end, which would make a look fail.
    atexit.register(lambda: (_left.set(), thread.join(4 * SECONDS)))
