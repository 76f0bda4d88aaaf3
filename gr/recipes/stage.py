"""Stages: the ordered steps of a recipe, each done once.

A stage is done when its ``artifact.json`` exists and holds the hash of the inputs it was made from; it is written last,
so a run that was cut off takes up at the stage that was not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr.distributed.process import ProcessContext, broadcast_object, raise_together
from gr.errors import UserError
from gr.files import write_json


class Stopped(Exception):
    """A stage was asked to stop (by a signal) and has saved; every rank raises it. The same command resumes."""


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: Of its folder, ``<run>/stages/<name>``.
        inputs: Plain data that determine the result; their hash decides whether the stage is done.
        run: Writes into the folder and returns plain data for ``artifact.json``.
        everywhere: Whether every rank takes part; otherwise rank 0 works and the others wait.
        outputs: Files (relative to the run folder) that must exist for the stage to count as done.
    """

    name: str
    inputs: Mapping[str, Any]
    run: Callable[[Path], Mapping[str, Any]]
    everywhere: bool = False
    outputs: tuple[str, ...] = ()


def run_stage(stage: Stage, run_dir: Path, ctx: ProcessContext) -> dict[str, Any]:
    """Runs a stage unless it is done; every rank gets what it returned.

    Raises:
        Stopped: The stage says so; nothing is marked as done.
        UserError: On every rank, whichever rank met it.
    """
    folder = run_dir / "stages" / stage.name
    text = json.dumps(stage.inputs, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    done = broadcast_object(_finished(stage, run_dir, folder, digest) if ctx.is_main else None, ctx)
    if done is not None:
        return done
    result: Mapping[str, Any] = {}
    error: UserError | None = None
    try:
        if ctx.is_main or stage.everywhere:
            folder.mkdir(parents=True, exist_ok=True)
            result = stage.run(folder)
        if ctx.is_main:
            write_json(folder / "artifact.json", {"inputs": digest, "result": dict(result)})
    except UserError as found:
        error = found
    raise_together(error, ctx)
    return broadcast_object(json.loads(json.dumps(result)), ctx)


def _finished(stage: Stage, run_dir: Path, folder: Path, digest: str) -> dict[str, Any] | None:
    try:
        artifact = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = artifact.get("inputs") == digest and all((run_dir / name).exists() for name in stage.outputs)
    return artifact["result"] if whole else None
