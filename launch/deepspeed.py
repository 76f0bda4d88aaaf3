"""``gr-launch deepspeed``: through DeepSpeed's own launcher, which reaches the machines of a hostfile by ssh."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gr.distributed.network import check_port_free, free_port
from gr.errors import UserError
from gr.launch.run import Command
from gr.launch.torchrun import MODULE, check_counts, threads


def build(
    config: str,
    overrides: Sequence[str],
    *,
    nproc: int,
    cores: int,
    env: Mapping[str, str],
    python: str = "",
    hostfile: str = "",
    port: int = 0,
) -> Command:
    """Builds the command; starts nothing.

    Args:
        config: Path of the run's YAML file, handed on untouched.
        overrides: Further arguments of the training command, handed on untouched.
        nproc: Processes on each machine.
        cores: CPU cores of this machine.
        env: Environment to extend; an OMP_NUM_THREADS in it is kept.
        python: Interpreter; the running one by default.
        hostfile: Lines ``host slots=N``; empty: this machine alone.
        port: Where rank 0 listens; 0: a free one. On several machines 29500, DeepSpeed's own.

    Raises:
        UserError: DeepSpeed is not installed, or no such hostfile, or the port is in use.
    """
    check_counts(nproc, 0)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("gr-launch deepspeed: deepspeed is not installed; make setup installs it on Linux")
    if hostfile and not Path(hostfile).is_file():
        raise UserError(f"hostfile {hostfile} does not exist; it holds lines like 'node0 slots=8'")
    if port and not hostfile:
        check_port_free(port)
    where = ["--hostfile", hostfile] if hostfile else ["--hostfile", ""]  # else a file in /job would be taken
    port = port or (29500 if hostfile else free_port())
    argv = (
        *(python or sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *where),
        *("--num_gpus", str(nproc), "--master_port", str(port), "--no_local_rank", "--module", MODULE),
        *(config, *overrides),
    )
    return Command(argv, {**threads(nproc, cores), **env})
