"""Objectives over vectors. None of them sees a table, an id or a process group.

S supervised positions, R negatives, D vector size, V items. Every function returns one loss a position, (S,) float32;
the caller weighs and sums them, and the trainer divides by the global weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLLISION_LOGIT = -5e4  # what the reference recipe gives a negative that is the positive: e**-5e4 is 0


@dataclass(frozen=True)
class Losses:
    """What an objective returns.

    Attributes:
        total: Scalar, sum over this process's positions of weight times loss. Differentiable.
        parts: Named scalars (sums), for the log.
        weight: Scalar, sum of the weights: the normaliser once summed over processes and micro-batches.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    weight: Tensor


def negative_logits(query: Tensor, negatives: Tensor) -> Tensor:
    """(S, R) inner products of (S, D) with shared (R, D) or per-position (S, R, D) negatives."""
    if negatives.dim() == 2:
        return query @ negatives.T
    return torch.bmm(negatives, query.unsqueeze(2)).squeeze(2)


def sampled_softmax(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    scale: float,
    collision: Tensor,
    log_q: Tensor | None = None,
    positive_log_q: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the positive against sampled negatives.

    With ``log_q`` every logit loses the log of the expected number of draws of its item, which makes the sampled
    softmax a consistent estimate of the full one (Bengio and Senecal 2008; Yi et al. 2019). Without it this is the
    loss of the HSTU reference recipe (arXiv 2402.17152, section 4.1.1).

    Args:
        query: (S, D), normalised by the caller where the similarity asks for it.
        positive: (S, D).
        negatives: (R, D) or (S, R, D).
        scale: Inverse temperature.
        collision: (S, R) bool, negatives that are the position's own label.
        log_q: (R,) or (S, R).
        positive_log_q: (S,).
    """
    own = (query * positive).sum(-1, keepdim=True).float() * scale
    others = negative_logits(query, negatives).float() * scale
    if log_q is not None:
        others = others - log_q
    if positive_log_q is not None:
        own = own - positive_log_q.unsqueeze(1)
    logits = torch.cat([own, others.masked_fill(collision, COLLISION_LOGIT)], dim=1)
    return torch.logsumexp(logits, dim=1) - own.squeeze(1)


def full_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue: logits (S, V), target (S,) int64."""
    return F.cross_entropy(logits.float(), target, reduction="none")


def binary_cross_entropy(
    query: Tensor, positive: Tensor, negatives: Tensor, *, scale: float, collision: Tensor
) -> Tensor:
    """SASRec's loss (Kang and McAuley 2018, network training), with the mean over negatives in place of their sum.

    Shapes as in ``sampled_softmax``. Collisions are left out of the average.
    """
    own = (query * positive).sum(-1).float() * scale
    others = negative_logits(query, negatives).float() * scale
    kept = (~collision).float()
    return F.softplus(-own) + (F.softplus(others) * kept).sum(1) / kept.sum(1).clamp(min=1.0)
