"""Runs as jobs of Slurm, one each. Jobs outlive the driver: the same command finds them again by ``job.json``."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from gr.errors import UserError
from gr.files import write_json
from gr.launch.slurm import check_options, requeued
from gr.scaling.design import Resources
from gr.scaling.executors import THREADS, worker
from gr.scaling.store import RunDir, read_json

LOOK_EVERY_S = 5.0


def script(folder: Path, resources: Resources) -> str:
    """The batch script of a run: told of its limit, it saves and goes back into the queue.

    Raises:
        UserError: A time or an option that cannot be.
    """
    check_options(resources.time, resources.sbatch, "resources.")
    threads = resources.threads or 1
    options = [f"job-name=gr-{folder.name}", "nodes=1", "ntasks=1", f"cpus-per-task={threads}", "requeue"]
    options += ["open-mode=append", f"signal=B:USR1@{resources.warn_s}", f"output={folder / 'log.txt'}"]
    options += [f"time={resources.time}"] if resources.time else []
    options += [f"gpus-per-node={resources.gpus:g}"] if resources.gpus else []
    return requeued([*options, *resources.sbatch], [f"export {THREADS}={threads}"], shlex.join(worker(folder)))


class Slurm:
    """Jobs.

    Args:
        slots: How many in the queue or running at a time.
        resources: What each asks for.
    """

    farewell = "the jobs stay in Slurm's queue; the same command watches them again, scancel ends them"

    def __init__(self, slots: int, resources: Resources) -> None:
        for tool in ("sbatch", "squeue"):
            if shutil.which(tool) is None:
                raise UserError(
                    f"{tool} was not found; run this where jobs are submitted, or print its scripts: --dry-run"
                )
        self.slots, self.resources = slots, resources
        self._running: dict[Path, str] = {}

    def start(self, folder: Path) -> None:
        """Submits a job, unless that of an earlier driver is still there."""
        folder = folder.absolute()
        job = (read_json(folder / "job.json") or {}).get("slurm")
        queue = None if job is None else self._queue()
        if job is None or (queue is not None and job not in queue):  # while Slurm does not answer it may be there
            text = script(folder, self.resources)
            done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
            found = re.match(r"\d+", done.stdout)
            if done.returncode or not found:
                raise UserError(f"sbatch refused a job: {(done.stderr or done.stdout).strip()}")
            job = found.group()
            write_json(folder / "job.json", {"slurm": job})
        self._running[folder] = job

    def _queue(self) -> list[str] | None:
        """Our jobs that are not over; ``None`` while Slurm does not answer."""
        done = subprocess.run(["squeue", "--me", "--noheader", "--format=%i"], capture_output=True, text=True)
        return None if done.returncode else done.stdout.split()

    def ended(self) -> list[tuple[Path, str]]:
        """Since the last call; what a run has written says how it ended, for Slurm may not remember."""
        queue = self._queue()
        over = [] if queue is None else [folder for folder, job in self._running.items() if job not in queue]
        if not over and self._running:
            time.sleep(LOOK_EVERY_S)
        for folder in over:
            del self._running[folder]
        return [(folder, "failed" if RunDir(folder).result() is None else "done") for folder in over]

    def stop(self) -> None:
        """Nothing: the jobs are Slurm's."""
