"""Several hosts as one run: the flags of the commands that can be one of them."""

import jax
from absl import flags

from var_jax import BadInput

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several hosts: TPU pods, Slurm and the like tell which."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if nothing tells.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Then also: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "And: which this is, from 0.")


def several() -> bool:
    """Whether the flags say that there are several."""
    return DISTRIBUTED.value or COORDINATOR.value is not None


def join() -> None:
    """Joins the other processes of a run, if the flags say so; called before anything else of jax.

    Raises: BadInput if nothing tells who they are.
    """
    if not several():
        if NUM_PROCESSES.value is not None or PROCESS_ID.value is not None:
            raise BadInput("--num_processes and --process_id need --coordinator or --distributed.")
        return
    try:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"--distributed: {str(error).strip().splitlines()[0]}") from error
