"""Training checkpoints: the whole state of a run and its place in the data, on Orbax v1."""

import sys
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from var_jax import BadInput, Failure
from var_jax.checkpoints import storage
from var_jax.sharding.mesh import of_first
from var_jax.tools.files import PATIENCE
from var_jax.tools.trees import flatten

PyTree = Any


class Checkpoints:
    """The checkpoints of one training run, in `directory/STEP`.

    The newest `keep` stay, and of the others every `keep_every`-th step (0: none).

    Writing is asynchronous and atomic: whenever the process dies, every finished checkpoint stays
    usable, and what was half written is ignored and removed at the next start. `before_commit`
    runs in the background, when all is written and nothing is visible yet.
    """

    def __init__(
        self,
        directory: str | PurePath,
        *,
        keep: int = 3,
        keep_every: int = 0,
        before_commit: Callable[[], None] = lambda: None,
    ):
        self._directory = storage.resolve(directory)
        self._keep, self._keep_every, self._before_commit = keep, keep_every, before_commit
        self._step = -1  # The step being saved, and the save itself.
        self._saving: ocp.AsyncResponse[bool] | None = None
        self._orbax = self._open()

    def save(self, step: int, state: PyTree, data: dict, wait: bool = False) -> None:
        """Starts saving `state` (arrays) and `data` (the input iterator's position).

        Returns once the state is copied off the devices, so that it may be donated. A step that is
        already saved is left as it is. `data` is JSON-able; process 0's is the one stored.

        Raises:
            Exception: this write failed (with `wait`), or an earlier one did in the background.
        """
        self.wait()
        # What process 0 sees: a network file system may show others an older list.
        if not of_first(lambda: np.array(step in self._steps()), (), bool):
            items = {"state": flatten(state), "data": data}
            self._step = step
            self._saving = self._orbax.save_checkpointables_async(step, items, force=True)
        if wait:
            self.wait()

    def restore(self, abstract: PyTree) -> tuple[int, PyTree, dict] | None:
        """The newest readable checkpoint as (step, state, data), bit for bit; None if none exists.

        `abstract` holds `jax.ShapeDtypeStruct`s with the shardings to restore onto. A damaged
        checkpoint is reported on stderr, moved aside and passed over for the one before it.

        Raises:
            BadInput: the state saved is another one (names the first tensor that differs), or no
                checkpoint can be read.
        """
        self.wait()
        damaged: dict[int, str] = {}
        step = np.iinfo(np.int32).max
        while (step := self._newest_before(step)) >= 0:
            found, reason = self._read(step, storage.with_shardings(abstract))
            if found is not None:
                self._set_aside(damaged, step)
                flat, data = found
                return step, jax.tree.unflatten(jax.tree.structure(abstract), flat), data
            damaged[step] = reason
        if damaged:
            # Nothing is moved here: a second try must not start over in an emptied directory.
            step, reason = next(iter(damaged.items()))
            raise BadInput(
                f"no checkpoint in {self._directory} can be read (step {step}: {reason}); expected "
                "at least one undamaged checkpoint, or an empty directory to start over."
            )
        return None

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises what went wrong with it, on any process."""
        saving = self._saving
        reason = self._finish()
        if saving is not None and not _on_every_process(not reason):
            raise self._lost(reason or "elsewhere")

    def close(self) -> None:
        """Waits, then frees the background threads.

        Asks no other process: they may be amid a step when an exception of this one closes it.
        """
        if reason := self._finish():
            raise self._lost(reason)
        self._orbax.close()

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        keep = policies.LatestN(self._keep)
        if self._keep_every:
            keep = policies.AnyPreservationPolicy([keep, policies.EveryNSteps(self._keep_every)])
        return ocp.training.Checkpointer(
            self._directory,
            # A lambda, because Orbax deep-copies its options: a bound method would copy `self`.
            context=storage.context(before_commit=lambda: self._record_files()),
            preservation_policy=keep,  # type: ignore[arg-type]  # Orbax's own type is too narrow
            cleanup_tmp_directories=True,
        )

    def _steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def _newest_before(self, step: int) -> int:
        """The newest checkpoint before a step, -1 if there is none: process 0's answer for all.

        A network file system may show other processes an older list. Raises: Failure if one of
        them does not see it in time.
        """
        newest = lambda: np.array(max((s for s in self._steps() if s < step), default=-1), np.int32)
        found, end = int(of_first(newest, (), np.int32)), time.monotonic() + PATIENCE
        while found >= 0 and found not in self._steps() and time.monotonic() < end:
            time.sleep(1)
            self._orbax.reload()
        if not _on_every_process(found < 0 or found in self._steps()):
            raise Failure(
                f"{self._directory / str(found)} is not seen by all processes; try again."
            )
        return found

    def _record_files(self) -> None:
        """Runs in the background when all is written, before the checkpoint gets its final name."""
        self._before_commit()
        for path in self._directory.iterdir() if jax.process_index() == 0 else ():
            if path.name.split(".")[0] == str(self._step):
                storage.record_files(path)

    def _finish(self) -> str:
        """Ends the save under way, if any: why it does not open here from where it lies, or ""."""
        saving, self._saving = self._saving, None
        if saving is None:
            return ""
        saving.result()
        try:
            self._orbax.checkpointables_metadata(self._step)
            if jax.process_index() == 0:
                storage.seal(self._directory / str(self._step))
        except Exception as error:  # Orbax and tensorstore have no common error for damage.
            return storage.reason(error)
        return ""

    def _lost(self, reason: str) -> OSError:
        path = self._directory / str(self._step)
        return OSError(f"{path} was saved but cannot be read back ({reason})")

    def _read(self, step: int, wanted: dict) -> tuple[tuple[list, dict] | None, str]:
        """((arrays in the order of `wanted`, data), "") or (None, why it cannot be read)."""
        path = self._directory / str(step)
        found, reason = None, storage.damage(path) if jax.process_index() == 0 else ""
        if _on_every_process(not reason):
            try:
                saved = self._orbax.checkpointables_metadata(step).metadata["state"]
                storage.compare(saved, wanted, f"checkpoint {path}", dtypes=True)
                items = self._orbax.load_checkpointables(step, {"state": wanted, "data": None})
                found = [items["state"][name] for name in wanted], items["data"]
            except (BadInput, MemoryError, jax.errors.JaxRuntimeError):  # of a device: its memory
                raise
            except Exception as error:  # Orbax and tensorstore have no common error for damage.
                reason = storage.reason(error)
        if not _on_every_process(found is not None):
            return None, reason or "another process could not read it"
        return found, ""

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        """Moves damaged checkpoints to `damaged-STEP`, so that their steps can be saved again."""
        if not damaged:
            return
        self._orbax.close()
        for step, reason in damaged.items():
            path, aside = (self._directory / name for name in (str(step), f"damaged-{step}"))
            if jax.process_index() == 0:
                aside.rmtree(missing_ok=True)
                path.rename(aside)
                print(
                    f"checkpoint {path} cannot be read ({reason}): moved it to {aside.name} and "
                    f"going on from step {good}",
                    file=sys.stderr,
                )
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._orbax = self._open()


def _on_every_process(ok: bool) -> bool:
    """Whether `ok` holds everywhere: hosts that restored different steps would mix them."""
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())
