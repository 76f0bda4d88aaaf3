"""A study's folder is its database: one folder a run, done when its ``result.json`` is there, written last.

::

    <out>/<study>/runs/<run_id>/spec.json    what to do: the whole config, the recipe, hashes, planned cost
                                heartbeat.json, log.txt, error.json, job.json (Slurm's number)
                                memory.json   how its batches were divided when they did not fit
                                model/       an ordinary run folder: gr-evaluate and gr-recommend read it
                                result.json  measured cost and metrics; a diverged run has one, too
                  floor_<eval_hash>.json               the least loss that the world allows, the same for every run
                  runs.csv timings.csv fits.json

Delete a run's folder to have it run again. Needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gr.errors import UserError
from gr.files import locked, write_json

SCHEMA = 1
HEARTBEAT_S = 20.0
STALE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run, complete: with the code and the data of its hashes it can be done anywhere.

    Attributes:
        run_id: Of everything that decides its result; see ``make_run_id``.
        study, variant, recipe: Where it comes from.
        scale, budget, seed: Its cell.
        holdout: Whether it is predicted only.
        planned: Integers steps, tokens, labels, pairs, model_flops, n_encoder, and epochs, as the plan counted them.
        judging: ``users`` and ``ks``.
        data_hash, eval_hash: What it must find.
        config: The whole RunConfig as plain data.
    """

    run_id: str
    study: str
    variant: str
    recipe: str
    scale: float
    budget: float
    seed: int
    holdout: bool
    planned: dict[str, float]
    judging: dict[str, Any]
    data_hash: str
    eval_hash: str
    config: dict[str, Any]

    @property
    def cost(self) -> float:
        """Model FLOPs."""
        return self.planned["model_flops"]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.variant} scale {self.scale:g} at {self.budget:.3g} FLOPs seed {self.seed}"


def make_run_id(config_hash: str, recipe: str, data_hash: str, eval_hash: str) -> str:
    """12 hex digits of the sha256 of what decides a result."""
    text = json.dumps([SCHEMA, config_hash, recipe, data_hash, eval_hash], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_json(path: Path) -> Any:
    """The content; ``None`` if the file is missing or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @property
    def spec_file(self) -> Path:
        """What to do."""
        return self.path / "spec.json"

    @property
    def model(self) -> Path:
        """The ordinary run folder."""
        return self.path / "model"

    def write_spec(self, spec: RunSpec) -> None:
        """Puts the spec there, unless it is there."""
        wanted = asdict(spec)
        if read_json(self.spec_file) != json.loads(json.dumps(wanted)):
            write_json(self.spec_file, wanted)

    def spec(self) -> RunSpec:
        """What to do.

        Raises:
            UserError: Missing or damaged.
        """
        raw = read_json(self.spec_file)
        try:
            return RunSpec(**{f.name: raw[f.name] for f in fields(RunSpec)})
        except (KeyError, TypeError):
            raise UserError(f"{self.spec_file} is missing or damaged; gr-scaling run writes it again") from None

    def result(self) -> dict[str, Any] | None:
        """What came out, or ``None`` if the run is not done."""
        raw = read_json(self.path / "result.json")
        whole = isinstance(raw, dict) and raw.get("schema") == SCHEMA and raw.get("run_id") == self.path.name
        return raw if whole else None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """The last file that a run writes."""
        (self.path / "error.json").unlink(missing_ok=True)
        write_json(self.path / "result.json", {"schema": SCHEMA, "run_id": self.path.name, **result})

    def error(self) -> dict[str, Any] | None:
        """What went wrong the last time."""
        raw = read_json(self.path / "error.json")
        return raw if isinstance(raw, dict) else None

    def write_error(self, kind: str, message: str) -> None:
        """``kind``: the exception's class, or ``crash``."""
        write_json(self.path / "error.json", {"kind": kind, "message": message})

    def reason(self) -> str:
        """Why it diverged or failed, in words; empty otherwise."""
        result, error = self.result(), self.error() or {}
        return str((error.get("message") if result is None else result["reason"]) or "")

    def batches(self) -> dict[str, int] | None:
        """``batch_size`` and ``accumulate`` that fit where those of the spec did not."""
        raw = read_json(self.path / "memory.json")
        return raw if isinstance(raw, dict) else None

    def write_batches(self, batch_size: int, accumulate: int) -> None:
        """For the next attempt."""
        write_json(self.path / "memory.json", {"batch_size": batch_size, "accumulate": accumulate})

    def state(self, now: float | None = None) -> str:
        """done, diverged, running, failed, preempted (begun, and nobody is at it) or planned."""
        result = self.result()
        if result is not None:
            return str(result["status"])
        if self._alive(time.time() if now is None else now):
            return "running"
        if self.error() is not None:
            return "failed"
        saved = any(path.suffix != ".tmp" for path in self.model.glob("checkpoints/step-*"))
        return "preempted" if saved else "planned"

    def _alive(self, now: float) -> bool:
        beat = read_json(self.path / "heartbeat.json")
        if not isinstance(beat, dict):
            return False
        if beat.get("host") == socket.gethostname():
            born = _born(beat.get("pid"))
            if born is None or born != beat.get("born"):
                return False
        return now - float(beat.get("time", 0.0)) < STALE_S

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """While entered, says every ``HEARTBEAT_S`` that this process is at it."""
        path, over = self.path / "heartbeat.json", threading.Event()

        def beat() -> None:
            with contextlib.suppress(UserError):
                pid = os.getpid()
                mine = {"pid": pid, "born": _born(pid), "host": socket.gethostname(), "time": time.time()}
                write_json(path, mine)

        def loop() -> None:
            while not over.wait(HEARTBEAT_S):
                beat()

        beat()
        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            path.unlink(missing_ok=True)


def _born(pid: Any) -> str | None:
    """When a process of this machine began, in the kernel's ticks; ``None``: it is gone, or dead and not yet reaped.

    A number alone would not do: the next process of that number would count as the one that was killed.
    """
    try:
        after_name = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if after_name[0] in "ZX" else after_name[19]


def run_dir(study_folder: Path, run_id: str) -> RunDir:
    """The folder of a run of a study."""
    return RunDir(study_folder / "runs" / run_id)


def all_runs(study_folder: Path) -> list[RunDir]:
    """Every folder with a spec, by name."""
    return [RunDir(path.parent) for path in sorted((study_folder / "runs").glob("*/spec.json"))]


def spent_flops(study_folder: Path) -> int:
    """Model FLOPs of every run that has ended, those of earlier designs, too."""
    results = (run.result() for run in all_runs(study_folder))
    return sum(int(result["measured"]["model_flops"]) for result in results if result is not None)


def driving(study_folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps a second driver from a study.

    Raises:
        UserError: Another one has it, or the folder cannot be written.
    """
    return locked(study_folder / ".lock", f"{study_folder} is being run by another gr-scaling; wait, or end that one")


def seen_rates(study_folder: Path) -> list[tuple[RunSpec, float]]:
    """Runs that took time, with the model FLOP/s of a device that each was seen to do."""
    results = ((run, run.result()) for run in all_runs(study_folder))
    return [
        (run.spec(), result["measured"]["model_flops"] / result["timings"]["train_seconds"])
        for run, result in results
        if result is not None and result["timings"]["train_seconds"] > 0
    ]


def nearest_rate(seen: Sequence[tuple[RunSpec, float]], wanted: RunSpec) -> float | None:
    """The rate of the variant's run of nearest scale, the dearest of those, else of another variant's; ``None``:
    nothing was seen."""

    def far(run: tuple[RunSpec, float]) -> tuple[bool, float, float]:
        spec = run[0]
        return spec.variant != wanted.variant, abs(spec.scale - wanted.scale), -spec.cost

    return min(seen, key=far)[1] if seen else None
