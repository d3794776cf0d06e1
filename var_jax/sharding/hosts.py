"""Several hosts as one run: the flags of the commands that can be one of them."""

import jax
from absl import flags

from var_jax import BadInput


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

    Raises: BadInput if nothing tells who they are.
    """
    if not are_several(args):
        if args.num_processes is not None or args.process_id is not None:
            raise BadInput("--num_processes and --process_id need --coordinator or --distributed.")
        return
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"--distributed: {str(error).strip().splitlines()[0]}") from error
