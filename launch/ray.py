"""``gr-launch ray``: Ray Train's workers, each running ``gr.train``; a lost worker has all of them started again.

Nothing goes through Ray but the start and the end: batches, checkpoints and resuming are the run's own, so a run may be
begun under Ray and continued under torchrun.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr.distributed.network import check_reachable
from gr.errors import LOST, UserError, run_cli
from gr.launch.torchrun import check_counts, threads

_LOOK_EVERY_S = 1.0
_REACH_S = 20.0
_STARTS = 3  # Ray gives its own start 30 s, which a busy machine exceeds
_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # imports from a network file system take longer than Ray's 60 s
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# On one machine nothing is preempted, and without a dashboard nobody asks for metrics.
# Its workers would run at niceness 15, behind everything else of this machine.
_ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_worker_niceness": "0"}
# Tells every second that there is no dashboard to ask.
_NOISE = "(PlacementGroupCleaner "


@dataclass(frozen=True)
class Job:
    """What Ray is asked for.

    Attributes:
        argv: Arguments of the training command.
        workers: Processes, one a GPU.
        gpu: Whether each gets one.
        cpus: Cores of each.
        max_restarts: How often all workers are started again when one is lost.
        address: ``HOST:PORT`` of a running cluster; empty: a Ray of our own on this machine.
        storage: A folder that all machines share; Ray keeps its notes there while the job runs.
        name: Of the run.
        timeout_s: Of a step's collectives.
    """

    argv: tuple[str, ...]
    workers: int
    gpu: bool
    cpus: float
    max_restarts: int
    address: str
    storage: str
    name: str
    timeout_s: float

    def describe(self) -> str:
        """What would be done, in Ray's words."""
        where = f"address={self.address!r}" if self.address else f"num_cpus={self.local_cpus()} (a Ray of our own)"
        return (
            f"ray.init({where})\n"
            f"TorchTrainer(gr.train.cli [{' '.join(self.argv)}],\n"
            f"  ScalingConfig(num_workers={self.workers}, use_gpu={self.gpu}, "
            f"resources_per_worker={self.resources()}),\n"
            f"  RunConfig(storage_path={self.storage!r}, FailureConfig(max_failures={self.max_restarts})))"
        )

    def resources(self) -> dict[str, float]:
        """Of each worker."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.gpu else {})}

    def local_cpus(self) -> int:
        """Enough for the workers: Ray waits for ever for cores that it does not have."""
        return max(os.cpu_count() or 1, -int(-self.cpus * self.workers // 1))


def make_job(argv: Sequence[str], config: Any, *, workers: int, cpus: float, max_restarts: int, address: str) -> Job:
    """Checks what can be checked without Ray.

    Raises:
        UserError: Ray is not installed, numbers that cannot be, or nobody at ``address``.
    """
    import torch

    check_counts(workers, max_restarts)
    if importlib.util.find_spec("ray") is None:
        raise UserError("gr-launch ray: ray is not installed; make setup installs it")
    if cpus <= 0:
        raise UserError(f"--cpus {cpus:g}: each process needs a share of a core above 0")
    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return Job(
        tuple(argv), workers, gpu, cpus, max_restarts, address,
        str((Path(config.runs) / ".ray").absolute()), config.name, config.timeout_s,
    )  # fmt: skip


def connect(address: str, cpus: int) -> None:
    """Joins a cluster, or starts a Ray of our own on this machine.

    Args:
        address: ``HOST:PORT``; empty: our own.
        cpus: Cores that our own believes to have.

    Raises:
        UserError: Nobody at ``address``, or our own does not start.
    """
    if address:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--address {address!r}: must be HOST:PORT of a running Ray, for instance node0:6379")
        check_reachable(host, int(port), _REACH_S)
    for name, value in {**_ALWAYS, **({} if address else _ALONE)}.items():
        os.environ.setdefault(name, value)
    import ray

    mine = {} if address else dict(num_cpus=cpus, include_dashboard=False, object_store_memory=2**28)
    for left in reversed(range(_STARTS)):
        try:
            ray.init(address=address or "local", log_to_driver=True, **mine)
            return
        except Exception as error:  # Ray has no class for it
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if not left:
                raise UserError(
                    f"Ray did not start on this machine in {_STARTS} attempts of half a minute; is it overloaded?"
                ) from None


def execute(job: Job) -> int:
    """Runs the job to its end and returns what the training command returned on rank 0.

    SIGINT, SIGTERM and SIGUSR1 have the workers save and end.

    Raises:
        UserError: The cluster cannot be reached or is too small.
    """
    connect(job.address, job.local_cpus())
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    notes = f"{job.name}-{os.getpid()}-{int(time.time())}"
    try:
        _check_size(job, ray.cluster_resources())
        board = ray.remote(num_cpus=0)(_Board).remote()
        result: list[BaseException | None] = [None]
        backend = "cpu:gloo,cuda:nccl" if job.gpu else "gloo"
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "argv": list(job.argv), "board": board, "folder": os.getcwd(), "path": list(sys.path),
                "env": threads(job.workers, os.cpu_count() or 1),
            },
            scaling_config=ScalingConfig(
                num_workers=job.workers, use_gpu=job.gpu, resources_per_worker=job.resources()
            ),
            run_config=RunConfig(
                name=notes, storage_path=job.storage, failure_config=FailureConfig(max_failures=job.max_restarts)
            ),
            torch_config=TorchConfig(backend=backend, timeout_s=int(job.timeout_s)),
        )  # fmt: skip

        def fit() -> None:
            try:
                trainer.fit()
            except Exception as error:  # Ray's own; kept for the main thread
                result[0] = error

        # In a thread, so that signals come to us: Ray's own handler for Ctrl-C drops the workers unsaved.
        fitting = threading.Thread(target=fit, daemon=True)
        previous = {}

        def hand_on(number: int, _: object) -> None:
            board.stop.remote()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, hand_on)
        try:
            with contextlib.redirect_stderr(_Without(sys.stderr, _NOISE)):
                fitting.start()
                while fitting.is_alive():
                    fitting.join(0.5)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        status = ray.get(board.status.remote())
        if status is not None:
            return int(status)
        error = result[0]
        print(f"the workers ended without a result: {str(error).strip().splitlines()[-1:]}", file=sys.stderr)
        return LOST
    finally:
        ray.shutdown()
        shutil.rmtree(Path(job.storage) / notes, ignore_errors=True)
        with contextlib.suppress(OSError):  # not while another job's notes are there
            Path(job.storage).rmdir()


def _check_size(job: Job, has: dict[str, float]) -> None:
    for what, each in job.resources().items():
        if each * job.workers > has.get(what, 0.0):
            raise UserError(
                f"{job.workers} processes with {each:g} {what} each need {each * job.workers:g}, and this Ray has "
                f"{has.get(what, 0.0):g}; use fewer processes, or --cpus with a smaller share"
            )


class _Without(io.TextIOBase):
    """A stream less the writes that hold a word."""

    def __init__(self, stream: Any, word: str) -> None:
        self._stream, self._word = stream, word

    def write(self, text: str) -> int:
        """Hands on, or drops."""
        if self._word not in text:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on."""
        self._stream.flush()


class _Board:
    """An actor that knows whether a stop was asked for and how the run ended."""

    def __init__(self) -> None:
        self._stopping = False
        self._status: int | None = None

    def stop(self) -> None:
        """From the driver."""
        self._stopping = True

    def stopping(self) -> bool:
        """To the workers."""
        return self._stopping

    def end(self, rank: int, status: int) -> None:
        """From a worker: rank 0 speaks for all, and a mistake that another alone met counts, too."""
        if rank == 0 or status == 2:
            self._status = status

    def status(self) -> int | None:
        """None while nothing is final."""
        return self._status


def _work(given: dict[str, Any]) -> None:
    """What a Ray worker runs, in a thread of its own; Ray has made the process group and the environment."""
    import ray

    from gr import train
    from gr.training.signals import ask_to_stop

    board = given["board"]
    if ray.get(board.status.remote()) is not None:
        return  # started again after an end that is final
    if os.path.isdir(given["folder"]):
        os.chdir(given["folder"])
    os.environ.update({name: value for name, value in given["env"].items() if name not in os.environ})
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY_S):
            if ray.get(board.stopping.remote()):
                ask_to_stop()

    threading.Thread(target=watch, daemon=True).start()
    try:
        status = run_cli(train.main, list(given["argv"]))
    finally:
        over.set()
    if status == LOST:
        raise RuntimeError("lost the other processes")  # Ray starts all again
    ray.get(board.end.remote(int(os.environ["RANK"]), status))
    if status not in train.AGREED:
        raise RuntimeError(f"ended with status {status}")
