"""Who runs the runs. An executor starts what it is given and tells what has ended; it knows nothing of studies."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from gr.errors import STOPPED
from gr.scaling.design import Resources

WORKER = "gr.scaling.worker"
STATES = {0: "done", STOPPED: "stopped"}
THREADS = "OMP_NUM_THREADS"
SAVING = "stopping: runs are saving; the same command goes on"


class Executor(Protocol):
    """What the driver asks for.

    Attributes:
        slots: Runs at a time.
        farewell: What ``stop`` does, for people.
    """

    slots: int
    farewell: str

    def start(self, folder: Path) -> None:
        """Begins a run."""
        ...

    def ended(self) -> list[tuple[Path, str]]:
        """Runs that have ended since the last call: done, stopped or failed. Waits a moment for the first."""
        ...

    def stop(self) -> None:
        """Ends what this process began, saved, and waits for it; what lives on by itself is left."""
        ...


def worker(folder: Path) -> list[str]:
    """The command of a run; the same again resumes."""
    return [sys.executable, "-m", WORKER, str(folder)]


def command(folder: Path, resources: Resources) -> str:
    """The same for a shell, where the driver was called."""
    threads = "" if resources.threads is None else f"{THREADS}={resources.threads} "
    return threads + shlex.join(worker(folder))


class Inline:
    """One after the other in this process: for tiny runs, whose start would cost more than they do."""

    slots = 1
    farewell = SAVING

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self._ended: list[tuple[Path, str]] = []

    def start(self, folder: Path) -> None:
        """Does the whole run."""
        from gr.scaling.worker import work_here

        state = work_here(folder, self.device)
        self._ended.append((folder, "done" if state == "diverged" else state))

    def ended(self) -> list[tuple[Path, str]]:
        """Since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        """Nothing runs between two calls."""


class Local:
    """Processes on this machine, each kept to cores of its own where there are enough.

    Args:
        slots: How many at a time; all share the GPU if there is one.
        threads: Of each; ``None``: OMP_NUM_THREADS where it is set, else the machine's cores shared among ``slots``.
    """

    farewell = SAVING

    def __init__(self, slots: int, threads: int | None = None) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.slots = slots
        self.env = dict(os.environ)
        if threads is not None:
            self.env[THREADS] = str(threads)
        self.env.setdefault(THREADS, str(max(1, len(cores) // slots)))
        each = threads or max(1, len(cores) // slots)
        enough = each * slots <= len(cores)
        self._free = [set(cores[i * each : (i + 1) * each]) if enough else set(cores) for i in range(slots)]
        self._running: dict[Path, tuple[subprocess.Popen[bytes], set[int]]] = {}

    def start(self, folder: Path) -> None:
        """In a process group of its own, so that Ctrl-C in the terminal reaches it once, through ``stop``."""
        cores = self._free.pop(0)
        with open(folder / "log.txt", "ab") as log:
            child = subprocess.Popen(
                worker(folder), stdout=log, stderr=subprocess.STDOUT, env=self.env, process_group=0
            )
        with contextlib.suppress(OSError):  # it has no threads yet: those that it starts will inherit
            os.sched_setaffinity(child.pid, cores)
        self._running[folder] = child, cores

    def ended(self) -> list[tuple[Path, str]]:
        """Since the last call."""
        if self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(iter(self._running.values()))[0].wait(0.2)
        over = {f: child.returncode for f, (child, _) in self._running.items() if child.poll() is not None}
        for folder in over:
            self._free.append(self._running.pop(folder)[1])
        return [(folder, STATES.get(status, "failed")) for folder, status in over.items()]

    def stop(self) -> None:
        """SIGTERM: the trainer saves at the next step."""
        for child, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        for child, _ in self._running.values():
            child.wait()
