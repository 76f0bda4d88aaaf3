"""The definitions in plain torch: any float dtype, any device, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for a left-out logit where gradients are autograd's: e**-5e4 is 0, and a row of nothing else has a finite sum.
LEFT_OUT = -5e4


def sampled_logits_reference(query: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """``out[s, r] = query[s] . vectors[index[s, r]]``; makes the ``(S, R, D)`` tensor of gathered vectors."""
    gathered = vectors.index_select(0, index.reshape(-1)).view(*index.shape, vectors.shape[1])
    return (gathered @ query.unsqueeze(2)).squeeze(2)


def sampled_softmax_reference(
    query: Tensor,
    positive: Tensor,
    vectors: Tensor,
    index: Tensor,
    *,
    collision: Tensor | None = None,
    log_q: Tensor | None = None,
    positive_log_q: Tensor | None = None,
) -> Tensor:
    """``-log(e^own / (e^own + sum_r e^logit))``: ``softmax_of_logits`` of ``sampled_logits_reference``."""
    logits = sampled_logits_reference(query, vectors, index)
    return softmax_of_logits((query * positive).sum(1), logits, collision, log_q, positive_log_q)


def softmax_of_logits(
    own: Tensor,
    logits: Tensor,
    collision: Tensor | None = None,
    log_q: Tensor | None = None,
    positive_log_q: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a positive among candidates.

    Args:
        own: ``(S,)`` logits of the positives.
        logits: ``(S, R)``, of the candidates.
        collision: ``(S, R)`` bool, candidates that are left out.
        log_q: ``(R,)`` or ``(S, R)``, taken from the candidates' logits.
        positive_log_q: ``(S,)``, taken from the positives' logits.

    Returns:
        ``(S,)``, in float32 at least.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    own, logits = own.to(exact), logits.to(exact)
    if log_q is not None:
        logits = logits - log_q
    if positive_log_q is not None:
        own = own - positive_log_q
    if collision is not None:
        logits = logits.masked_fill(collision, LEFT_OUT)
    # log(1 + e^(others - own)). Unlike softplus it never takes e^-x for 0.
    return -F.logsigmoid(own - torch.logsumexp(logits, dim=1))
