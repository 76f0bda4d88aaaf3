"""The softmax over a catalogue whose rows are divided among ranks.

Each rank scores everybody's queries against its own rows; what is exchanged is queries and three numbers a position,
and never a row of the table. With S positions of all ranks and vectors of D numbers a step costs, a rank: S D numbers
received (queries), 3 S all-reduced (largest logit, sum of exponentials, the target's logit), S D all-reduced backward
(gradients of queries). Logits are made twice, forward and backward, because the second walk needs the sums over all
ranks: four products where the local form needs three.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gr.distributed.exchange import Everybody

BLOCK_LOGITS = {"cpu": 2**19}
OTHER_BLOCK_LOGITS = 2**26
LEAST_ROWS = 64


def sharded_softmax_loss(query: Tensor, vectors: Tensor, first: int, target: Tensor, weight: Tensor) -> Tensor:
    """() weighted sum over this rank's positions of the cross-entropy of the target among all ranks' vectors.

    A collective, forward and backward. The gradient of ``vectors`` is that of the sum of all ranks' losses.

    Args:
        query: (S, D) of this rank.
        vectors: (n, D), rows ``first``..``first + n - 1`` of the catalogue; each row on one rank.
        first: See above.
        target: (S,) int64 rows of the catalogue.
        weight: (S,) floats; gets no gradient.
    """
    with torch.autocast(query.device.type, enabled=False):  # as in the local form: the dtype of query decides
        return _ShardedSoftmax.apply(query, vectors, first, target, weight.detach())


class _ShardedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, vectors: Tensor, first: int, target: Tensor, weight: Tensor) -> Tensor:
        everybody = Everybody.of(query.shape[0], query.device)
        queries, targets = everybody.gather(query), everybody.gather(target)
        exact = torch.promote_types(query.dtype, torch.float32)
        top = queries.new_full((everybody.total,), -torch.inf, dtype=exact)
        mass, own = torch.zeros_like(top), torch.zeros_like(top)
        column, here = _columns(targets, first, vectors.shape[0])
        if vectors.shape[0]:
            for rows in _blocks(everybody.total, vectors):
                logits = (queries[rows] @ vectors.T).to(exact)
                own[rows] = logits.gather(1, column[rows, None]).squeeze(1)
                top[rows] = logits.amax(1)
                mass[rows] = logits.sub_(top[rows, None]).exp_().sum(1)
        highest = top.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        sums = torch.stack([mass * (top - highest).exp(), own * here])
        dist.all_reduce(sums)
        each = sums[0].log() - (sums[1] - highest)
        ctx.save_for_backward(queries, vectors, column, here, highest, sums[0], weight.to(exact))
        ctx.everybody = everybody
        return (each[everybody.own] * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        queries, vectors, column, here, highest, mass, weight = ctx.saved_tensors
        everybody: Everybody = ctx.everybody
        weights = everybody.gather(weight * grad)
        d_queries = torch.zeros_like(queries, dtype=weights.dtype)
        d_vectors = torch.zeros_like(vectors, dtype=weights.dtype)
        if vectors.shape[0]:
            for rows in _blocks(everybody.total, vectors):
                share = (queries[rows] @ vectors.T).to(weights.dtype).sub_(highest[rows, None]).exp_()
                share.mul_((weights[rows] / mass[rows])[:, None])
                share.scatter_add_(1, column[rows, None], -(weights[rows] * here[rows])[:, None])
                share = share.to(queries.dtype)
                d_queries[rows] = (share @ vectors).to(weights.dtype)
                d_vectors += (share.T @ queries[rows]).to(weights.dtype)
        dist.all_reduce(d_queries)
        return d_queries[everybody.own].to(queries.dtype), d_vectors.to(vectors.dtype), None, None, None


def _columns(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Column of each target among this rank's ``count`` vectors (0 where it is elsewhere), and 1.0 where it is here."""
    column = targets - first
    here = (column >= 0) & (column < count)
    return torch.where(here, column, 0), here.to(torch.float32)


def _blocks(total: int, vectors: Tensor) -> list[slice]:
    size = max(LEAST_ROWS, BLOCK_LOGITS.get(vectors.device.type, OTHER_BLOCK_LOGITS) // vectors.shape[0])
    return [slice(lo, min(lo + size, total)) for lo in range(0, total, size)]
