"""Runs as tasks of Ray: each is the ordinary process of a run, so that it leaves the GPU as clean as one by hand.

Study, cache and code must lie where every machine finds them under the same names.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from gr.errors import STOPPED, UserError
from gr.launch.ray import connect
from gr.scaling.design import Resources
from gr.scaling.executors import SAVING, STATES, THREADS, worker

GRACE_S = 600.0  # for all to save
STOP = "stop"  # in a run's folder: its task is to end it


class Ray:
    """Tasks.

    Args:
        slots: How many at a time.
        resources: ``threads``, ``gpus``, ``address``, ``retries``.

    Raises:
        UserError: Nobody at the address, or it has less than one run asks for.
    """

    farewell = SAVING

    def __init__(self, slots: int, resources: Resources) -> None:
        threads = resources.threads or 1
        connect(resources.address, max(os.cpu_count() or 1, threads * slots))
        import ray

        check_size({"CPU": threads, "GPU": resources.gpus}, ray.cluster_resources())
        self._ray, self.slots = ray, slots
        self._env = {THREADS: str(threads)}
        self._task = ray.remote(num_cpus=threads, num_gpus=resources.gpus, max_retries=resources.retries)(_work)
        self._running: dict[Any, Path] = {}

    def start(self, folder: Path) -> None:
        """Hands it to Ray, which may keep it waiting for cores."""
        folder = folder.absolute()
        (folder / STOP).unlink(missing_ok=True)
        reference = self._task.remote(worker(folder), os.getcwd(), self._env, str(folder))
        self._running[reference] = folder

    def ended(self) -> list[tuple[Path, str]]:
        """Since the last call."""
        if not self._running:
            return []
        try:
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        except SystemError as error:  # what a signal raised while Ray's C code ran
            raise error.__cause__ or error from None
        if not ready:
            time.sleep(0.2)  # where signals do no harm
        return [(self._running.pop(reference), self._state(reference)) for reference in ready]

    def _state(self, reference: Any) -> str:
        try:
            return STATES.get(self._ray.get(reference), "failed")
        except self._ray.exceptions.RayError:
            return "failed"  # its machine was lost more often than it may be

    def stop(self) -> None:
        """Tasks find a file, hand SIGTERM on and wait for the save: Ray's own cancelling reaches them too late."""
        for folder in self._running.values():
            (folder / STOP).touch()
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE_S)
        for folder in self._running.values():
            (folder / STOP).unlink(missing_ok=True)
        self._ray.shutdown()


def check_size(asked: dict[str, float], has: dict[str, float]) -> None:
    """Ray would wait for ever for what it does not have.

    Raises:
        UserError: As said.
    """
    for what, each in asked.items():
        if each > has.get(what, 0.0):
            raise UserError(
                f"a run asks for {each:g} {what} and all of this Ray has {has.get(what, 0.0):g}; lower "
                f"resources.{'threads' if what == 'CPU' else 'gpus'}"
            )


def _work(argv: list[str], cwd: str, env: dict[str, str], folder: str) -> int:
    """In a Ray worker: the exit status of the run's process."""
    stop, asked = Path(folder) / STOP, False
    if stop.exists():
        return STOPPED
    with open(Path(folder) / "log.txt", "ab") as out:
        child = subprocess.Popen(
            argv, cwd=cwd, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.5)
        if stop.exists() and not asked:
            asked = True
            child.send_signal(signal.SIGTERM)
