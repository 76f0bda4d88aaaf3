"""Runs a plan. It remembers nothing: what is done lies in the study's folder, so it may be killed and run again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gr.scaling.design import Study
from gr.scaling.executors import Executor, make_executor
from gr.scaling.store import RunDir, RunSpec, run_dir

FINISHED = ("done", "diverged")


@dataclass
class Outcome:
    """What became of a call.

    Attributes:
        ran: Runs that ended here, by state.
        already: Runs that were done before.
        failed: Runs that did not finish, with what they said.
        stopped: Whether a signal ended the call.
    """

    ran: dict[str, str] = field(default_factory=dict)
    already: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


class _Stop(BaseException):
    """SIGTERM or Ctrl-C."""


def run_plan(
    study: Study, specs: Sequence[RunSpec], executor: Executor | None = None, say: Callable[[str], None] = print
) -> Outcome:
    """Does every run that is not done, the dearest first, at most ``slots`` at a time.

    Args:
        study: Whose folder it is.
        specs: The runs.
        executor: ``None``: as the study says.
        say: For a line a run.
    """
    executor = make_executor(study) if executor is None else executor
    outcome = Outcome()
    by_folder = {run_dir(study.folder, spec.run_id).path: spec for spec in specs}
    todo: list[RunSpec] = []
    for spec in sorted(specs, key=lambda spec: -spec.cost):
        folder = run_dir(study.folder, spec.run_id)
        folder.write_spec(spec)
        if folder.state() in FINISHED:
            outcome.already += 1
        else:
            todo.append(spec)
    running: dict[str, RunSpec] = {}
    before = signal.signal(signal.SIGTERM, _raise_stop) if _in_main_thread() else None
    try:
        while (todo or running) and not outcome.stopped:
            _fill(study, executor, todo, running, outcome)
            if not (running or _waiting_for_others(study, todo)):
                break
            for folder, state in executor.ended():
                spec = by_folder[folder]
                del running[spec.run_id]
                _after(study, spec, state, outcome, say)
    except (_Stop, KeyboardInterrupt):
        outcome.stopped = True
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if outcome.stopped:
        say("stopping: runs are saving; the same command goes on")
        executor.stop()
    return outcome


def _raise_stop(number: int, frame: object) -> None:
    raise _Stop


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _fill(study: Study, executor: Executor, todo: list[RunSpec], running: dict[str, RunSpec], outcome: Outcome) -> None:
    """Starts what there is room for; runs of another driver's surviving processes are left to them."""
    for spec in list(todo):
        if len(running) >= executor.slots:
            return
        folder = run_dir(study.folder, spec.run_id)
        state = folder.state()
        if state in FINISHED:
            todo.remove(spec)
            outcome.already += 1
        elif state != "running":
            todo.remove(spec)
            running[spec.run_id] = spec
            (folder.path / "error.json").unlink(missing_ok=True)
            executor.start(folder.path)


def _after(study: Study, spec: RunSpec, state: str, outcome: Outcome, say: Callable[[str], None]) -> None:
    folder = run_dir(study.folder, spec.run_id)
    if state == "done":
        result = folder.result()
        assert result is not None, f"{spec.run_id} ended well without a result"
        outcome.ran[spec.run_id] = result["status"]
        said = result["reason"] or f"loss {result['metrics']['loss']:.4f}  {result['timings']['train_seconds']:.1f} s"
        say(f"{result['status']:<9} {spec.run_id}  {spec.title}  {said}")
    elif state == "stopped":
        outcome.stopped = True
    else:
        outcome.failed[spec.run_id] = _message(folder)
        say(f"failed    {spec.run_id}  {spec.title}  {outcome.failed[spec.run_id]}")


def _message(folder: RunDir) -> str:
    error = folder.error()
    if error is not None:
        return str(error["message"])
    log = folder.path / "log.txt"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    folder.write_error("crash", lines[-1] if lines else "ended without a word")
    return lines[-1] if lines else "ended without a word"


def _waiting_for_others(study: Study, todo: Sequence[RunSpec]) -> bool:
    """Whether something is being run by a process that an earlier driver left behind."""
    if any(run_dir(study.folder, spec.run_id).state() == "running" for spec in todo):
        time.sleep(0.5)
        return True
    return False
