"""The same block by block of positions: no tensor of S V numbers, forward or backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits of a block, by kind of device: 2 MiB of a processor's cache; enough to fill a GPU.
BLOCK_LOGITS = {"cpu": 2**19}
OTHER_BLOCK_LOGITS = 2**26
# Each block adds to all of d_vectors, so it must not be small, however many items there are.
LEAST_ROWS = 64


def exact_dtype(query: Tensor) -> torch.dtype:
    """What the loss is computed in after the products."""
    return torch.promote_types(query.dtype, torch.float32)


def total_loss(query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor, gradients: bool) -> list[Tensor]:
    """``[total ()]``, and its gradients ``[(S, D), (V, D)]`` in float32 at least if they are asked for."""
    exact = exact_dtype(query)
    total = query.new_zeros((), dtype=exact)
    d_query = query.new_empty(query.shape if gradients else (0,), dtype=exact)
    d_vectors = vectors.new_zeros(vectors.shape if gradients else (0,), dtype=exact)
    weight = weight.to(exact)
    for rows, logits in _blocks(query, vectors):
        own = logits.gather(1, target[rows, None])
        top = logits.amax(1, keepdim=True)
        terms = logits.sub_(top).exp_()
        norm = terms.sum(1, keepdim=True)
        # own - top is exact where it matters most: where the target leads.
        each = norm.log() - (own - top)
        total += (each.squeeze(1) * weight[rows]).sum()
        if gradients:
            share = terms.mul_(weight[rows, None] / norm)
            share.scatter_add_(1, target[rows, None], -weight[rows, None])
            _add_products(share.to(query.dtype), query[rows], vectors, d_query[rows], d_vectors)
    return [total, d_query, d_vectors]


def _add_products(share: Tensor, query: Tensor, vectors: Tensor, d_query: Tensor, d_vectors: Tensor) -> None:
    """``d_query = share @ vectors``, ``d_vectors += share.T @ query``."""
    if d_query.dtype == query.dtype:
        torch.mm(share, vectors, out=d_query)
        d_vectors.addmm_(share.T, query)
    else:
        d_query.copy_(share @ vectors)
        d_vectors.add_(share.T @ query)


def _blocks(query: Tensor, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of positions and their logits, which the next block overwrites."""
    size = max(LEAST_ROWS, BLOCK_LOGITS.get(query.device.type, OTHER_BLOCK_LOGITS) // max(1, vectors.shape[0]))
    buffer = query.new_empty(min(size, query.shape[0]), vectors.shape[0])
    for lo in range(0, query.shape[0], size):
        rows = slice(lo, min(lo + size, query.shape[0]))
        logits = torch.mm(query[rows], vectors.T, out=buffer[: rows.stop - lo])
        yield rows, logits.to(exact_dtype(query))
