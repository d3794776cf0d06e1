"""Kills commands at random moments and fills their disk; the end must equal a run never disturbed.

    python -m benchmarks.storm --kills 100                    # SIGKILL, one process
    python -m benchmarks.storm --kills 40 --processes 2       # SIGKILL, one of two processes
    python -m benchmarks.storm --full_disks 20                # on a tmpfs, which root may mount

Training (of tests/commands/tiny.py, a checkpoint after each step), encoding and sampling take
turns. Each runs undisturbed first. Then it starts again and again in one folder until it ends by
itself, and what it leaves is compared bit for bit. Prints the figures; --out writes them as JSON.
"""

import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from var_jax.sampling.exports import load_models
from var_jax.tools import cli

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "train": "--config=tests/commands/tiny.py --config.every.save=1 --workdir=",
    "encode": "--checkpoint=emoji --images=emoji --copies=3 --batch_size=16 --out=",
    "sample": "--checkpoint=emoji --num=96 --batch_size=8 --out=",
}
TMPFS_SIZE = 48  # MB; an undisturbed run needs a third of it


def define_flags() -> None:
    """Defines the flags of this benchmark."""
    flags.DEFINE_integer("kills", 0, "SIGKILLs of each command.")
    flags.DEFINE_integer("full_disks", 0, "Times that the disk of each command fills.")
    flags.DEFINE_list("commands", list(COMMANDS), "Which.")
    flags.DEFINE_integer("processes", 1, "Of each command.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("out", None, "JSON file for the figures.")


def main(args: flags.FlagValues) -> None:
    """Disturbs each command and compares what it leaves."""
    rng, table = random.Random(args.seed), {}
    for name in args.commands:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):  # the second one compiles nothing
                calm, start = Path(folder) / "calm", time.monotonic()
                shutil.rmtree(calm, ignore_errors=True)
                command = Command(name, calm, args.processes)
                assert command.wait() == 0, command.errors()
            seconds, wanted = time.monotonic() - start, outputs(name, calm)
            storm = Storm(name, Path(folder), args.processes, seconds, wanted, rng)
            if args.kills:
                storm.kill(args.kills)
            if args.full_disks:
                storm.fill(args.full_disks)
        table[name] = {"processes": args.processes, "seconds undisturbed": round(seconds, 1)}
        table[name] |= storm.counts
        print(name, table[name], flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(table, indent=2) + "\n")


class Command:
    """A command at work on a folder, as one process or several."""

    def __init__(self, name: str, folder: Path, processes: int = 1):
        self._log = Path(tempfile.gettempdir()) / f"storm-{os.getpid()}.log"
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        argv = [sys.executable, "-m", f"var_jax.{name}", *(COMMANDS[name] + str(folder)).split()]
        several = f"--coordinator={address} --num_processes={processes} --process_id="
        with self._log.open("w") as log:
            self.running = [
                subprocess.Popen(
                    argv + ((several + str(i)).split() if processes > 1 else []),
                    cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log,
                )
                for i in range(processes)
            ]  # fmt: skip

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code of the first process; None if it still runs after so many seconds."""
        try:
            return self.running[0].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, first: int) -> None:
        """Kills one process at once, the others two seconds later, as a supervisor would."""
        self.running[first].send_signal(signal.SIGKILL)
        if len(self.running) > 1:
            time.sleep(2)
        for process in self.running:
            process.kill()
            process.wait()

    def errors(self) -> str:
        """What was said on stderr."""
        return self._log.read_text()


class Storm:
    """Disturbs one command until it was disturbed often enough."""

    def __init__(self, name, folder, processes, seconds, wanted, rng):
        self._name, self._folder, self._processes = name, folder / "stormy", processes
        self._seconds, self._wanted, self._rng = seconds, wanted, rng
        self.counts = collections.Counter()

    def kill(self, times: int) -> None:
        """SIGKILL at random moments."""
        while self.counts["kills"] < times:
            command, start = self._start(self._folder)
            code = command.wait(self._rng.uniform(0, self._seconds))
            if code is None:
                command.kill(self._rng.randrange(self._processes))
                self.counts["kills"] += 1
                self.counts["kills amid a write"] += amid_write(self._folder)
                print(self._name, dict(self.counts), file=sys.stderr, flush=True)
            else:  # a machine whose other work has ended is faster than before
                self._seconds = min(self._seconds, time.monotonic() - start)
                self._ended(command, code)
        self._finish()

    def fill(self, times: int) -> None:
        """A disk that is full from a random moment on, until the command has ended."""
        self._folder.mkdir(exist_ok=True)
        options = f"size={TMPFS_SIZE}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self._folder], check=True)
        try:
            while self.counts["full disks"] < times:
                command, start = self._start(self._folder / "run")
                code = command.wait(self._rng.uniform(0, self._seconds))
                if code is None:
                    filler = self._folder / "filler"
                    fill_disk(filler)
                    code = command.wait(600)
                    filler.unlink()
                    for process in command.running:
                        process.wait()
                else:
                    self._seconds = min(self._seconds, time.monotonic() - start)
                if code == 0:
                    self._compare(self._folder / "run")
                    continue
                self.counts["full disks"] += 1
                self.counts[f"exit code {code}"] += 1
                message = re.search(r"^error: .*is full", command.errors(), re.MULTILINE)
                self.counts["reported in one sentence"] += bool(message)
                print(self._name, dict(self.counts), file=sys.stderr, flush=True)
                if not message:
                    print(self._name, code, command.errors()[-3000:], flush=True)
            command = Command(self._name, self._folder / "run", self._processes)
            assert command.wait() == 0, command.errors()
            self._compare(self._folder / "run")
        finally:
            subprocess.run(["umount", self._folder], check=True)

    def _start(self, folder: Path) -> tuple[Command, float]:
        return Command(self._name, folder, self._processes), time.monotonic()

    def _finish(self) -> None:
        command = Command(self._name, self._folder, self._processes)
        self._ended(command, command.wait())

    def _ended(self, command: Command, code: int | None) -> None:
        assert code == 0, command.errors()
        for process in command.running:
            assert process.wait() == 0, command.errors()
        self._compare(self._folder)

    def _compare(self, folder: Path) -> None:
        found = outputs(self._name, folder)
        equal = found.keys() == self._wanted.keys() and all(
            np.array_equal(found[name], value) for name, value in self._wanted.items()
        )
        self.counts["runs that ended"] += 1
        self.counts["runs that ended equal, bit for bit"] += equal
        if not equal:
            kept = Path(tempfile.mkdtemp(prefix=f"storm-{self._name}-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            print(f"{self._name}: unlike the undisturbed run; kept in {kept}", flush=True)
        shutil.rmtree(folder)


def outputs(name: str, folder: Path) -> dict[str, np.ndarray]:
    """All that a command leaves and that another run of it must leave, too."""
    if name == "sample":
        return dict(np.load(folder / "samples.npz"))
    if name == "encode":
        files = sorted(folder.glob("*.array_record"))
        return {path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in files}
    models = load_models(folder / "checkpoint")
    leaves = jax.tree.leaves_with_path((models.tokenizer, models.transformer))
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return found | {"metrics.jsonl": np.array(lines)}


def amid_write(folder: Path) -> bool:
    """Whether something half-written lies in a folder."""
    return any("tmp" in path.name or "partial" in path.name for path in folder.rglob("*"))


def fill_disk(path: Path) -> None:
    """Takes all that is free."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**20))
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            os.fsync(file.fileno())


if __name__ == "__main__":
    cli.run(main, define_flags)
