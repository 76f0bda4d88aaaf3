"""Full-corpus ranking where no process holds all items: each scores its own against everybody's targets.

What is exchanged is the queries of a batch (B D numbers), the target's score and two counts a target, never a row of
the table or a block of scores. Every process looks up for itself what all users of a round have seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gr.distributed.exchange import Everybody
from gr.distributed.process import ProcessContext, raise_together
from gr.errors import UserError
from gr.evaluation.ranking import (
    DIVERGED,
    SPAN_SCORES,
    Ranks,
    SeenRule,
    count,
    evaluating,
    masked_events,
    ranges,
    seen_pairs,
)


def rank_by_shards(model: Any, loader: Any, mask_seen: SeenRule, ctx: ProcessContext) -> Ranks:
    """Ranks every target of a loader among all items, as ``rank_targets`` does; a collective.

    Args:
        model: Has ``num_items``, ``query(batch) -> (B, D)``, ``own_scorer()``, ``item_rows`` and ``tables`` that
            are sharded.
        loader: This process's batches; ``len(loader)`` may differ by one between processes.
        mask_seen: As in ``rank_targets``.
        ctx: The processes.

    Returns:
        The ranks of all targets, on every process.

    Raises:
        UserError: On every process: the log has other items, or no target, or a score is NaN.
    """
    store, targets = loader.store, loader.targets
    name = type(model).__name__
    if model.num_items != store.num_items:
        raise UserError(f"{name} scores {model.num_items} items but the log has {store.num_items}; train it on it")
    user, position = np.asarray(targets.user), np.asarray(targets.position)
    if len(user) == 0:
        raise UserError("there is no target to rank; the split must hold out at least one event")
    truth = np.asarray(store.columns["item_id"])[np.asarray(store.offsets)[user] + position]
    window = masked_events(mask_seen, loader.layout) if mask_seen else None
    # better, at least as good: of this process's items, or rows that items share.
    counts = torch.zeros(2, len(user), dtype=torch.int64, device=ctx.device)
    candidates, missed = np.full(len(user), store.num_items), np.zeros(len(user), dtype=bool)
    diverged = False
    with evaluating(model), torch.no_grad():
        (lo, hi), score = model.own_scorer()
        for rows, queries in _rounds(model, loader, ctx):
            masked = None
            if mask_seen:
                row, item = seen_pairs(store, user[rows], position[rows], window)
                own = item == truth[rows][row]
                masked = row[~own], item[~own]
                candidates[rows] -= np.bincount(masked[0], minlength=len(rows))
                missed[rows[row[own]]] = True
            if lo == hi:
                _sum(queries.new_zeros(len(rows)))
                continue
            spans = ranges(lo, hi, max(1, SPAN_SCORES // len(rows)))
            better, at_least, nan = count(
                spans,
                lambda span, queries=queries: score(queries, span),
                truth[rows],
                masked,
                share=_sum,
                shared=model.item_rows,
            )
            at = torch.from_numpy(rows).to(ctx.device)
            counts[0, at], counts[1, at], diverged = better, at_least, diverged or nan
    raise_together(UserError(DIVERGED.format(name)) if diverged else None, ctx)
    dist.all_reduce(counts)
    better, at_least = counts.cpu().numpy()
    tied = at_least - better - 1
    better[missed], tied[missed] = candidates[missed] - 1, 0
    return Ranks(user, position, truth, better, tied, candidates, int(store.num_items))


def _rounds(model: Any, loader: Any, ctx: ProcessContext) -> Any:
    """((n,) rows of the targets, (n, D) their queries) of one batch of every process after the other.

    All processes take part in every look-up; one without a batch left asks for nothing.
    """
    most = torch.tensor(len(loader), device=ctx.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    batches = iter(loader)
    for _ in range(int(most)):
        found = next(batches, None)
        if found is None:
            nothing = torch.empty(0, dtype=torch.int64, device=ctx.device)
            vectors = model.tables(dict.fromkeys(model.tables.specs, nothing))["item"]
            rows, query = np.empty(0, np.int64), vectors
        else:
            rows, query = found[0], model.query(found[1].to(ctx.device))
        everybody = Everybody.of(len(rows), ctx.device)
        queries = everybody.gather(query)
        places = everybody.gather(torch.from_numpy(np.asarray(rows)).to(ctx.device)).cpu().numpy()
        start = 0
        for (
            size
        ) in everybody.counts:  # one process's batch at a time: the products then have the shapes they have alone
            if size:
                yield places[start : start + size], queries[start : start + size]
            start += size


def _sum(scores: Tensor) -> Tensor:
    dist.all_reduce(scores)
    return scores
