"""Who runs the runs. An executor starts what it is given and tells what has ended; it knows nothing of studies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from gr.scaling.design import Study

WORKER = "gr.scaling.worker"
STATES = {0: "done", 3: "stopped"}


class Executor(Protocol):
    """What the driver asks for.

    Attributes:
        slots: Runs at a time.
    """

    slots: int

    def start(self, folder: Path) -> None:
        """Begins a run."""
        ...

    def ended(self) -> list[tuple[Path, str]]:
        """Runs that have ended since the last call: done, stopped or failed."""
        ...

    def stop(self) -> None:
        """Asks everything to save and end, and waits for it."""
        ...


class Inline:
    """One after the other in this process: for tiny runs, whose start would cost more than they do."""

    slots = 1

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
    """Processes on this machine.

    Args:
        slots: How many at a time; several share the processor's threads, and the GPU if there is one.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.env = dict(os.environ)
        self.env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
        self._running: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path) -> None:
        """In a session of its own, so that Ctrl-C in the terminal reaches it once, through ``stop``."""
        with open(folder / "log.txt", "ab") as log:
            self._running[folder] = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
            )

    def ended(self) -> list[tuple[Path, str]]:
        """Waits a moment for the first if none has ended."""
        if self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(iter(self._running.values())).wait(0.2)
        over = {f: child.returncode for f, child in self._running.items() if child.poll() is not None}
        for folder in over:
            del self._running[folder]
        return [(folder, STATES.get(status, "failed")) for folder, status in over.items()]

    def stop(self) -> None:
        """SIGTERM: the trainer saves at the next step."""
        for child in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        for child in self._running.values():
            child.wait()


def make_executor(study: Study) -> Executor:
    """The executor that a study names."""
    return Inline(study.device) if study.executor == "inline" else Local(study.max_parallel)
