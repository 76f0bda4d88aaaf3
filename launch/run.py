"""Runs a launcher's command to its end: hands signals to the processes that train, and learns how they ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gr.train import STATUS_VARIABLE

# What launchers say of an end that the training command has told of itself.
_OF_LAUNCHERS = re.compile(r"[WE]\d{4} .*torch/distributed/|Traceback \(most recent call last\)|\[.*\] \[ERROR\]")


@dataclass(frozen=True)
class Command:
    """What is to be run: arguments, program first, and the whole environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def execute(command: Command, restarts: int = 0) -> int:
    """Runs the command to its end and returns what the training command itself returned.

    Launchers end every failure of a worker, a user's mistake included, with a traceback and a status of their own. The
    workers of this machine therefore leave their status in a file: where one did, that is the end, it is returned, and
    what the launcher has to say of it is not shown.

    SIGINT, SIGTERM and SIGUSR1 go to the workers themselves, as SIGUSR1: they save and end together. Launchers would
    give them 30 s and then kill them. Before there are workers, and at a second signal, the launcher gets SIGTERM.

    Args:
        command: The launcher's.
        restarts: How often the command is begun again when it ends without a status: for launchers that start no
            worker again themselves.
    """
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        for left in range(restarts, -1, -1):
            returned, asked = _once(command, status)
            if status.exists():
                return int(status.read_text() or returned)
            if returned == 0 or asked or not left:
                return returned
            print(f"ended with status {returned}; started again ({left - 1} times more)", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


def _once(command: Command, status: Path) -> tuple[int, bool]:
    """(the launcher's status, whether a signal asked for the end)."""
    asked = 0
    for stale in status.parent.glob("status.pid*"):
        stale.unlink()
    # A scheduler's SIGUSR1 may reach every process of a job, and would end a launcher that does not know it.
    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
    child = subprocess.Popen(
        command.argv,
        env={**command.env, STATUS_VARIABLE: str(status)},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # else the terminal sends Ctrl-C to the workers as well, and they get it twice
    )

    def hand_on(number: int, _: object) -> None:
        nonlocal asked
        asked += 1
        workers = [int(path.read_text() or 0) for path in status.parent.glob("status.pid*")]
        for worker in workers if asked == 1 else []:
            with contextlib.suppress(ProcessLookupError):
                if worker:
                    os.kill(worker, signal.SIGUSR1)
        if asked > 1 or not workers:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        old = signal.signal(number, hand_on)
        before.setdefault(number, old)
    try:
        assert child.stderr is not None
        quiet = False
        for line in child.stderr:
            quiet = quiet or (status.exists() and _OF_LAUNCHERS.match(line) is not None)
            if not quiet:
                print(line, end="", file=sys.stderr, flush=True)
        return child.wait(), asked > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
