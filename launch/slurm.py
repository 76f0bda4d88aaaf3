"""``gr-launch slurm``: a batch job of one ``gr-launch torchrun`` a machine, which saves and requeues before its limit.

Slurm warns the script ``warn_s`` seconds ahead (it may come up to a minute earlier); the script hands the signal on,
training saves at its next step and ends with status 3, and the script puts its own job back into the queue.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gr.errors import STOPPED, UserError
from gr.launch.torchrun import Nodes, check_counts

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_NAMES = re.compile(r"[A-Za-z0-9-]+(=.*)?")


@dataclass(frozen=True)
class Job:
    """What Slurm is asked for.

    Attributes:
        name: Of the job and its log.
        nodes: Machines.
        nproc: Processes on each, one a GPU.
        time: Limit in Slurm's form, for instance 4:00:00.
        warn_s: Seconds before the limit at which training saves; longer than a step, an evaluation and a save take.
        gpus: Asks for ``nproc`` GPUs on each machine.
        max_restarts: Of the workers within the job.
        more: Further options of sbatch, without the dashes, for instance ``partition=gpu``.
    """

    name: str
    nodes: int = 1
    nproc: int = 1
    time: str = ""
    warn_s: int = 180
    gpus: bool = False
    max_restarts: int = 3
    more: tuple[str, ...] = ()


def script(job: Job, config: str, overrides: Sequence[str], python: str = "") -> str:
    """The batch script.

    Raises:
        UserError: A number, a time or an option that cannot be.
    """
    check_counts(job.nproc, job.max_restarts)
    Nodes(str(job.nodes), 0, "any:1").check()
    if job.warn_s < 1:
        raise UserError(f"--warn {job.warn_s}: must be at least 1 second")
    check_options(job.time, job.more)
    options = [f"job-name={job.name}", f"nodes={job.nodes}", "ntasks-per-node=1", "requeue", "open-mode=append"]
    options += [f"signal=B:USR1@{job.warn_s}", "output=%x-%j.out"]
    options += [f"time={job.time}"] if job.time else []
    options += [f"gpus-per-node={job.nproc}"] if job.gpus else []
    options += job.more
    launch = [python or sys.executable, "-m", "gr.launch.cli", "torchrun", "--nproc", str(job.nproc)]
    launch += ["--max-restarts", str(job.max_restarts)]
    words = shlex.join([config, *overrides])
    # A single machine meets by itself; several meet on the first, at a port that other jobs do not have.
    meet = "" if job.nodes == 1 else ' --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rdzv "$meet"'
    task = shlex.quote(f"exec {shlex.join(launch)}{meet} {words}")
    before = [
        'first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        'export meet="$first:$((20000 + SLURM_JOB_ID % 10000))"',
    ]
    return requeued(options, before, f"srun --kill-on-bad-exit=0 bash -c {task}")


def check_options(time: str, more: Sequence[str], prefix: str = "--") -> None:
    """Refuses what sbatch would not understand.

    Args:
        time: Limit.
        more: Options.
        prefix: Of the names under which the user gave them.

    Raises:
        UserError: As said.
    """
    if time and not _TIME.fullmatch(time):
        raise UserError(f"{prefix}time {time}: must be minutes, H:MM:SS or D-HH:MM:SS")
    for option in more:
        if not _NAMES.fullmatch(option):
            raise UserError(f"{prefix}sbatch {option}: must be an option of sbatch without dashes, as in partition=gpu")


def requeued(options: Sequence[str], before: Sequence[str], command: str) -> str:
    """A batch script whose command is told of the limit, and which goes back into the queue if that ends with STOPPED.

    Args:
        options: Of sbatch, without the dashes.
        before: Lines ahead of the command.
        command: Runs in the background, so that the shell hears signals.
    """
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{option}" for option in options),
            *before,
            f"{command} &",
            "child=$!",
            "# The first signal only: a second one would end the launchers instead of asking again.",
            "trap 'trap \"\" USR1 TERM; kill -USR1 $child' USR1 TERM",
            "wait $child; status=$?",
            "# A signal ends wait, not the child.",
            "while kill -0 $child 2>/dev/null; do wait $child; status=$?; done",
            "wait $child 2>/dev/null; last=$?; [ $last -ne 127 ] && status=$last",
            f"if [ $status -eq {STOPPED} ]; then",
            '    echo "saved; back into the queue"',
            '    scontrol requeue "$SLURM_JOB_ID" && sleep 60',
            "fi",
            "exit $status",
            "",
        ]
    )


def submit(text: str) -> int:
    """Hands the script to sbatch and returns its status.

    Raises:
        UserError: There is no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch was not found; run this on a machine that submits to Slurm, or print it: --dry-run")
    return subprocess.run(["sbatch"], input=text, text=True).returncode
