"""``gr-launch torchrun``: one machine, N processes, through torch's own elastic launcher."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gr.errors import UserError
from gr.train import STATUS_VARIABLE

MODULE = "gr.train"
OF_TORCHRUN = re.compile(r"[WE]\d{4} .*torch/distributed/|Traceback \(most recent call last\)")


@dataclass(frozen=True)
class Command:
    """What is to be run: arguments, program first, and the whole environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def build(
    config: str, overrides: Sequence[str], *, nproc: int, cores: int, env: Mapping[str, str], python: str = ""
) -> Command:
    """Builds the command; starts nothing.

    Args:
        config: Path of the run's YAML file, handed on untouched.
        overrides: Further arguments of the training command, handed on untouched.
        nproc: Processes on this machine, one a GPU.
        cores: CPU cores of this machine. Left alone, every process would open a thread pool over all of them.
        env: Environment to extend; an OMP_NUM_THREADS in it is kept.
        python: Interpreter; the running one by default.

    Raises:
        UserError: ``nproc`` is less than one.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: the number of processes must be 1 or more")
    launcher = (python or sys.executable, "-m", "torch.distributed.run", "--standalone")
    argv = (*launcher, f"--nproc-per-node={nproc}", "-m", MODULE, config, *overrides)
    return Command(argv, {"OMP_NUM_THREADS": str(max(1, cores // nproc)), **env})


def default_nproc() -> int:
    """One process a visible GPU; one where there is none."""
    import torch

    return torch.cuda.device_count() or 1


def execute(command: Command) -> int:
    """Runs the command to its end and returns what the training command itself returned.

    torchrun ends every failure of a worker, a user's mistake included, and every stop by a signal with a traceback of
    its own and status 1. Rank 0 therefore leaves its own status in a file: where it did, that status is returned, and
    what torchrun has to say of it is not shown. A signal is handed on once, and the workers save.
    """
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        child = subprocess.Popen(
            command.argv,
            env={**command.env, STATUS_VARIABLE: str(status)},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # else the terminal sends Ctrl-C to the workers as well, and they get it twice
        )

        def hand_on(number: int, _: object) -> None:
            child.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            assert child.stderr is not None
            quiet = False
            for line in child.stderr:
                quiet = quiet or (status.exists() and OF_TORCHRUN.match(line) is not None)
                if not quiet:
                    print(line, end="", file=sys.stderr, flush=True)
            returned = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return int(status.read_text()) if status.exists() else returned
