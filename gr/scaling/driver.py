"""Runs a plan. It remembers nothing: what is done lies in the study's folder, so it may be killed and run again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gr.errors import UserError
from gr.scaling.design import Study
from gr.scaling.executors import Executor, Inline, Local
from gr.scaling.store import RunDir, RunSpec, driving, run_dir, spent_flops

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

    Raises:
        UserError: What is left would spend more than ``limits.total_flops``; another driver is at this study.
    """
    check_total(study, specs)
    with driving(study.folder):
        return _run(study, specs, make_executor(study) if executor is None else executor, say)


def make_executor(study: Study) -> Executor:
    """The executor that a study names; ``print`` has none, for it runs nothing."""
    assert study.executor != "print", "the command prints and ends"
    if study.executor == "ray":
        from gr.scaling.ray_executor import Ray

        return Ray(study.max_parallel, study.resources)
    if study.executor == "slurm":
        from gr.scaling.slurm_executor import Slurm

        return Slurm(study.max_parallel, study.resources)
    if study.executor == "inline":
        return Inline(study.device)
    return Local(study.max_parallel, study.resources.threads)


def unfinished(study: Study, specs: Sequence[RunSpec]) -> list[RunSpec]:
    """What a driver would do, the dearest first."""
    return [
        spec
        for spec in sorted(specs, key=lambda spec: -spec.cost)
        if run_dir(study.folder, spec.run_id).state() not in FINISHED
    ]


def check_total(study: Study, specs: Sequence[RunSpec]) -> None:
    """Refuses, with a ``UserError``, runs that with those done would exceed ``limits.total_flops``."""
    limit = study.limits.total_flops
    if limit is None:
        return
    spent, left = spent_flops(study.folder), sum(spec.cost for spec in unfinished(study, specs))
    if spent + left > limit:
        raise UserError(
            f"{study.folder} has spent {spent:.3g} model FLOPs and what is left would spend {left:.3g}, more than "
            f"limits.total_flops {limit:g}; raise it, or plan fewer or smaller runs"
        )


def _run(study: Study, specs: Sequence[RunSpec], executor: Executor, say: Callable[[str], None]) -> Outcome:
    outcome = Outcome()
    by_folder = {run_dir(study.folder, spec.run_id).path.absolute(): spec for spec in specs}
    for spec in specs:
        run_dir(study.folder, spec.run_id).write_spec(spec)
    todo = unfinished(study, specs)
    outcome.already = len(specs) - len(todo)
    running: dict[str, RunSpec] = {}
    before = signal.signal(signal.SIGTERM, _raise_stop) if _in_main_thread() else None
    try:
        while (todo or running) and not outcome.stopped:
            _fill(study, executor, todo, running, outcome)
            if not (running or _waiting_for_others(study, todo)):
                break
            for folder, state in executor.ended():
                spec = by_folder[folder.absolute()]
                del running[spec.run_id]
                _after(study, spec, state, outcome, say)
    except (_Stop, KeyboardInterrupt):
        outcome.stopped = True
    finally:  # an accident of the driver leaves nothing running either
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if outcome.stopped:
            say(executor.farewell)
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
            executor.start(folder.path.absolute())


def _after(study: Study, spec: RunSpec, state: str, outcome: Outcome, say: Callable[[str], None]) -> None:
    folder = run_dir(study.folder, spec.run_id)
    if state == "done":
        result = folder.result()
        assert result is not None, f"{spec.run_id} ended well without a result"
        outcome.ran[spec.run_id] = result["status"]
        said = result["reason"] or f"loss {result['metrics']['loss']:.4f}  {result['timings']['train_seconds']:.1f} s"
        fits = folder.batches()
        if fits is not None:
            said += f"  (out of memory at first: {fits['accumulate']} parts of {fits['batch_size']} sequences a step)"
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
