"""The same block by block of positions: no tensor of S V numbers, forward or backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits of a block, by kind of device: 2 MiB of a processor's cache; enough to fill a GPU.
BLOCK_LOGITS = {"cpu": 2**19}
OTHER_BLOCK_LOGITS = 2**26


def exact_dtype(query: Tensor) -> torch.dtype:
    """What the loss is computed in after the products."""
    return torch.promote_types(query.dtype, torch.float32)


def losses(query: Tensor, vectors: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, the largest logits, and the sums of exponentials beside these; ``(S,)`` each."""
    loss = query.new_empty(target.shape, dtype=exact_dtype(query))
    top, total = torch.empty_like(loss), torch.empty_like(loss)
    for rows, logits in _blocks(query, vectors):
        own = logits.gather(1, target[rows, None]).squeeze(1)
        torch.amax(logits, 1, out=top[rows])
        torch.sum(logits.sub_(top[rows, None]).exp_(), 1, out=total[rows])
        # own - top is exact where it matters most: where the target leads.
        loss[rows] = total[rows].log() - (own - top[rows])
    return loss, top, total


def gradients(
    grad: Tensor, query: Tensor, vectors: Tensor, target: Tensor, top: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the losses by ``query`` and ``vectors``, given theirs, ``grad`` (S,)."""
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_vectors = vectors.new_zeros(vectors.shape, dtype=exact_dtype(query))
    share = grad / total
    for rows, logits in _blocks(query, vectors):
        # Not e^(logit - lse): beside a top of 1e4 the log of the total has lost its digits.
        weights = logits.sub_(top[rows, None]).exp_().mul_(share[rows, None])
        weights.scatter_add_(1, target[rows, None], -grad[rows, None])
        weights = weights.to(query.dtype)
        torch.mm(weights, vectors, out=d_query[rows])
        if d_vectors.dtype == query.dtype:
            d_vectors.addmm_(weights.T, query[rows])
        else:
            d_vectors += weights.T @ query[rows]
    return d_query, d_vectors.to(vectors.dtype)


def _blocks(query: Tensor, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of positions and their logits, which the next block overwrites."""
    size = max(1, BLOCK_LOGITS.get(query.device.type, OTHER_BLOCK_LOGITS) // max(1, vectors.shape[0]))
    buffer = query.new_empty(min(size, query.shape[0]), vectors.shape[0])
    for lo in range(0, query.shape[0], size):
        rows = slice(lo, min(lo + size, query.shape[0]))
        logits = torch.mm(query[rows], vectors.T, out=buffer[: rows.stop - lo])
        yield rows, logits.to(exact_dtype(query))
