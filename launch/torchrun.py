"""``gr-launch torchrun``: one machine, N processes, through torch's own elastic launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gr.errors import UserError

MODULE = "gr.train"


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


def execute(command: Command) -> None:
    """Replaces this process, so that signals and the exit status are the launcher's own."""
    sys.stdout.flush()
    os.execvpe(command.argv[0], list(command.argv), dict(command.env))
