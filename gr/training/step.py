"""One optimizer step: gradients of sums, one global normaliser, clipping, update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gr.data.batch import JaggedBatch
from gr.distributed.engine import Engine, known_broken
from gr.distributed.process import ProcessContext, all_reduce_sum
from gr.flops import StepCost
from gr.training.phase import Phase, StepContext
from gr.training.watch import Stopwatch, Work, slots


@dataclass(frozen=True)
class StepResult:
    """On the device, so that nothing waits for it.

    Attributes:
        sums: (2 + parts,) float64: total, weight and the named parts, over micro-batches and ranks.
        own: (2,) float64: total and weight of this rank alone.
        parts: Names of the parts.
        grad_norm: Scalar, of the dense parameters' gradient before clipping.
        work: What this rank did for it.
    """

    sums: Tensor
    own: Tensor
    parts: tuple[str, ...]
    grad_norm: Tensor
    work: Work


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step, so that a resumed run draws what an undisturbed one would have drawn."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def run_step(
    engine: Engine,
    phase: Phase,
    batches: Iterable[JaggedBatch],
    num_batches: int,
    context: StepContext,
    ctx: ProcessContext,
    *,
    bf16: bool,
    step_cost=None,
    tables=None,
) -> StepResult:
    """Backward over the micro-batches, then one update, unless a sum or the gradient is not finite.

    The gradient is that of sum(total) / sum(weight) over all micro-batches of all ranks: gradients of totals
    are accumulated and divided once, before clipping. However sequences are dealt to ranks and micro-batches,
    the loss and its gradient are the same.

    Args:
        engine: The model as it is called and its optimizer, with this step's learning rate set.
        phase: Gives the objective.
        batches: Yields ``num_batches`` micro-batches.
        num_batches: How many, the same on every rank.
        context: Passed to the objective.
        ctx: Rank, world and device.
        bf16: Whether matrix products run in bfloat16.
        step_cost: ``batch -> StepCost`` with tokens, pairs, forward_flops; ``None``: only tokens are counted.
        tables: Tables that own their optimizer, with this step's learning rate set, or ``None``. They may learn during
            the backward pass, so the global weight is asked for before it, and there is one micro-batch. The same
            holds for an engine that divides gradients as they arrive.

    Returns:
        Sums and norm, still on the device.
    """
    device = ctx.device
    engine.zero_grad()
    scale_first = tables is not None or engine.scale_first
    seed_step(context.seed, context.step, ctx.rank)
    sums: Tensor | None = None
    names: tuple[str, ...] = ()
    broken = False
    cost, rows, forward = StepCost(), (0, 0), Stopwatch(device)
    for number, batch in enumerate(batches):
        assert batch.num_sequences > 0 and batch.num_tokens > 0, f"rank {ctx.rank} got an empty batch"
        one = step_cost(batch) if step_cost else StepCost(batch.num_tokens)
        cost += StepCost(one.tokens, one.pairs, one.forward_flops)
        rows = tuple(map(sum, zip(rows, slots(batch), strict=True)))
        batch = batch.to(device) if device.type != "cpu" else batch
        # The last micro-batch's forward and backward both belong to the reducing pass.
        with engine.micro_batch(last=number + 1 == num_batches):
            with forward, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                losses = phase.objective(engine.model, batch, context)
            if not scale_first:
                engine.backward(losses.total)
            else:
                assert num_batches == 1, "the weight of later batches is not known"
                known = torch.stack([losses.total, losses.weight]).detach().double()
                weight = all_reduce_sum(known, ctx)[1]
                # On a GPU nobody waits to know, so that rows of such a batch learn what is not finite.
                broken = known_broken(known)
                if not broken:
                    engine.backward(losses.total * _scale(weight, ctx).to(losses.total.dtype))
        names = tuple(sorted(losses.parts))
        scalars = [losses.total, losses.weight, *(losses.parts[name] for name in names)]
        packed = torch.stack([torch.as_tensor(s, device=device).detach().double() for s in scalars])
        sums = packed if sums is None else sums + packed
    assert sums is not None, "a step needs a batch"
    own = sums[:2].clone()
    all_reduce_sum(sums, ctx)
    grad_norm = engine.update(None if scale_first else _scale(sums[1], ctx), sums[:2])
    if broken:
        grad_norm = torch.full_like(grad_norm, torch.nan)
    if tables is not None and not known_broken(torch.cat([sums[:2], grad_norm.double().reshape(1)])):
        tables.update()
    work = Work(cost.tokens, cost.pairs, cost.forward_flops, *rows, forward)
    return StepResult(sums, own, names, grad_norm, work)


def _scale(weight: Tensor, ctx: ProcessContext) -> Tensor:
    """() what gradients are multiplied by, given the weight of all ranks.

    Data parallelism averages over ranks; the sum is wanted. A step without any weight keeps its zero gradient.
    """
    return ctx.world / torch.where(weight > 0, weight, 1.0)
