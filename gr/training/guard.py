"""A step whose loss or gradient is not finite: who had it, and the evidence on disk, to be looked at again.

``runs/<name>/diverged/step-XXXXXXXX/`` holds ``weights.pt``, the weights before the step, and ``rank-N.pt`` of each
rank whose batches gave the number. ``gr-replay`` loads both and computes the step again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gr.data.batch import JaggedBatch, Labels, Negatives
from gr.distributed.process import ProcessContext, all_gather_object
from gr.errors import UserError
from gr.training.checkpoint import load_torch, save_torch
from gr.training.phase import Phase, StepContext
from gr.training.step import StepResult, seed_step
from gr.training.weights import gather, own_tables, write_best

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Taken:
    """A step that was taken and not yet looked at.

    Attributes:
        context: Its number, seed, epoch and phase.
        index: The first of its loader batches in the epoch.
        num_batches: How many it learned from.
        result: On the device.
    """

    context: StepContext
    index: int
    num_batches: int
    result: StepResult


@dataclass(frozen=True)
class Evidence:
    """What ``rank-N.pt`` holds.

    Attributes:
        batches: The rank's micro-batches of the step, on the host.
        context: As it was.
        index: Loader index of the first batch in its epoch.
        rank: Whose batches, of ``world``.
        world: Ranks that trained.
        bf16: Whether matrix products ran in bfloat16.
        loss: Mean loss of the step, over all ranks; likewise ``grad_norm``.
        grad_norm: Of the dense parameters, before clipping.
        config_hash: Of the run's config.
    """

    batches: tuple[JaggedBatch, ...]
    context: StepContext
    index: int
    rank: int
    world: int
    bf16: bool
    loss: float
    grad_norm: float
    config_hash: str


def replay(
    model: nn.Module, phase: Phase, batches: Sequence[JaggedBatch], context: StepContext, rank: int, bf16: bool
) -> list[tuple[float, float]]:
    """Computes a rank's part of a step again, without an update.

    Args:
        model: Bare, with the weights before the step, in training mode.
        phase: Gives the objective.
        batches: The rank's micro-batches.
        context: The step's.
        rank: Whose dropout is drawn.
        bf16: Whether matrix products run in bfloat16.

    Returns:
        (mean loss per label, norm of its gradient over all parameters) of each micro-batch.
    """
    device = next(model.parameters()).device
    seed_step(context.seed, context.step, rank)
    seen = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            losses = phase.objective(model, batch.to(device), context)
        loss = losses.total / torch.where(losses.weight == 0, 1.0, losses.weight)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        seen.append((float(loss.detach()), float(norm)))
    model.zero_grad(set_to_none=True)
    return seen


def keep_evidence(
    folder: Path,
    model: nn.Module,
    phase: Phase,
    taken: Taken,
    batches: Sequence[JaggedBatch],
    facts: Mapping[str, Any],
    ctx: ProcessContext,
) -> str:
    """Saves a step that went wrong; a collective.

    Those ranks save whose own loss was not finite; if all were finite, those whose gradient is not, computed again; if
    nobody's is (it arose in the sum), or tables learn during the backward pass, which cannot be repeated then, all.

    Args:
        folder: For all such steps of the run.
        model: Bare. The step did not change its weights.
        phase: Gives the objective.
        taken: The step.
        batches: This rank's micro-batches of it, made again.
        facts: ``bf16``, ``loss``, ``grad_norm`` and ``config_hash`` of ``Evidence``.
        ctx: The processes.

    Returns:
        Half a sentence for the user, the same on every rank.
    """
    place = folder / f"step-{taken.context.step + 1:08d}"
    path = place / f"rank-{ctx.rank}.pt"
    try:
        write_best(gather(model, None, ctx), place / WEIGHTS, taken.context.step, {}, ctx)
    except UserError as error:
        return f"the batch could not be kept ({error})"
    failed = None
    if _at_fault(model, phase, taken, batches, facts["bf16"], ctx):
        found = Evidence(tuple(batches), taken.context, taken.index, ctx.rank, ctx.world, **facts)
        try:
            save_torch(path, _plain(found))
        except UserError as error:
            failed = str(error)
    else:
        path = None
    outcome = all_gather_object((None if path is None else str(path), failed), ctx)
    problems = [reason for _, reason in outcome if reason]
    if problems:
        return f"the batch could not be kept ({problems[0]})"
    names = [name for name, _ in outcome if name]
    return f"the batch is kept in {', '.join(names)}, which gr-replay computes again"


def load_evidence(path: str | Path) -> Evidence:
    """Reads ``rank-N.pt``.

    Raises:
        UserError: Missing, damaged, a folder, or another kind of file.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a rank-N.pt in it, of a run's diverged/step-N")
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; name a rank-N.pt of a run's diverged/step-N")
    try:
        raw = load_torch(Path(path))
    except UserError:  # which speaks of checkpoints
        raw = None
    names = {f.name for f in dataclasses.fields(Evidence)}
    if not isinstance(raw, dict) or set(raw) != names:
        raise UserError(
            f"{path} is damaged or holds no batch of a step that diverged; name a rank-N.pt of a run's diverged/step-N"
        )
    batches = tuple(_batch(batch) for batch in raw["batches"])
    return Evidence(**{**raw, "batches": batches, "context": StepContext(**raw["context"])})


def _at_fault(
    model: nn.Module, phase: Phase, taken: Taken, batches: Sequence[JaggedBatch], bf16: bool, ctx: ProcessContext
) -> bool:
    mine = not bool(torch.isfinite(taken.result.own).all())
    if any(all_gather_object(mine, ctx)):
        return mine
    if own_tables(model) is None:
        seen = replay(model, phase, batches, taken.context, ctx.rank, bf16)
        mine = not all(math.isfinite(number) for pair in seen for number in pair)
        if any(all_gather_object(mine, ctx)):
            return mine
    return True


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, so that a file holds tensors and plain data only."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    # A column may be a view of a whole log, which would be saved with it.
    return value.clone() if isinstance(value, Tensor) else value


def _batch(raw: dict[str, Any]) -> JaggedBatch:
    labels, negatives = raw["labels"], raw["negatives"]
    return JaggedBatch(
        **{
            **raw,
            "labels": None if labels is None else Labels(**labels),
            "negatives": None if negatives is None else Negatives(**negatives),
            "views": {name: _batch(view) for name, view in raw["views"].items()},
        }
    )
