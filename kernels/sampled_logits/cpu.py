"""Sampled logits on a CPU in plain torch: three sparse products (README.md), none of which makes ``(S, R, D)``.

bfloat16 and float16 are multiplied in float32. ``native.py`` has the same functions.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(query: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """``(S, R)`` inner products, a dense product sampled at the entries of a sparse matrix."""
    low, high = map(int, index.aminmax())
    if low < 0 or high >= vectors.shape[0]:
        raise ValueError(f"index must lie in 0..{vectors.shape[0] - 1}, got {low}..{high}")
    exact = exact_dtype(query)
    if index.shape[1] >= vectors.shape[0]:  # all of them are fewer (and torch refuses a pattern fuller than full)
        return (query.to(exact) @ vectors.to(exact).T).gather(1, index.long()).to(query.dtype)
    rows = torch.arange(0, index.numel() + 1, index.shape[1])
    places = index.new_zeros(index.numel(), dtype=exact)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        shape = (query.shape[0], vectors.shape[0])
        pattern = torch.sparse_csr_tensor(rows, index.reshape(-1).long(), places, shape, check_invariants=False)
        found = torch.sparse.sampled_addmm(pattern, query.to(exact), vectors.to(exact).T, beta=0.0)
    return found.values().view(index.shape).to(query.dtype)


def combine(weights: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """``(S, D)`` sums of each query's candidates with weights ``(S, R)``."""
    exact = exact_dtype(vectors)
    weights = weights.to(exact).contiguous()
    return F.embedding_bag(index.long(), vectors.to(exact), mode="sum", per_sample_weights=weights).to(vectors.dtype)


def spread(weights: Tensor, query: Tensor, index: Tensor, count: int) -> Tensor:
    """``(count, D)`` sums of each vector's queries with weights ``(S, R)``."""
    exact = exact_dtype(query)
    # A sum over the transposed matrix: its entries in order of their column, which is what a sort gives. The
    # narrowest integers sort fastest.
    narrow = torch.int16 if count <= 2**15 else torch.int32 if count <= 2**31 else torch.int64
    flat = index.reshape(-1)
    order = torch.sort(flat.to(narrow), stable=True).indices
    ends = torch.bincount(flat, minlength=count).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    weights = weights.to(exact).reshape(-1).index_select(0, order)
    queries = order.div_(index.shape[1], rounding_mode="floor")
    out = F.embedding_bag(queries, query.to(exact), starts, mode="sum", per_sample_weights=weights)
    return out.to(query.dtype)


def softmax(
    query: Tensor,
    positive: Tensor,
    vectors: Tensor,
    index: Tensor,
    collision: Tensor | None,
    log_q: Tensor | None,
    positive_log_q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss ``(S,)``, its gradient by query ``(S, D)``, probabilities ``(S, R)`` and their sums ``(S,)``.

    All of them in float32 at least.
    """
    exact = exact_dtype(query)
    query, positive, vectors = query.to(exact), positive.to(exact), vectors.to(exact)
    own = (query * positive).sum(1)
    logits = scores(query, vectors, index)
    if log_q is not None:
        logits = logits - log_q
    if positive_log_q is not None:
        own = own - positive_log_q
    if collision is not None:
        logits = logits.masked_fill(collision, -torch.inf)
    loss = -F.logsigmoid(own - torch.logsumexp(logits, 1))  # log(e^own + sum e^logit) - own, and no small loss is lost
    largest = torch.maximum(own, logits.amax(1))
    weights = (logits - largest[:, None]).exp()
    probability = weights / (weights.sum(1) + (own - largest).exp())[:, None]
    missed = probability.sum(1)
    d_query = combine(probability, vectors, index) - missed[:, None] * positive
    return loss, d_query, probability, missed


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What sums are made in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
