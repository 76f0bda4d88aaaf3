"""Objectives over vectors. None of them sees a table, an id or a process group.

S supervised positions, R negatives, D vector size, V items. Every function returns one loss a position, (S,) float32
(float64 of float64); the caller weighs and sums them, and the trainer divides by the global weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.kernels.sampled_logits import sampled_logits, sampled_softmax_loss, softmax_of_logits


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


def negative_logits(query: Tensor, negatives: Tensor, index: Tensor | None = None) -> Tensor:
    """(S, R) inner products of (S, D) with shared (R, D), per-position (S, R, D) or indexed negatives.

    With ``index`` (S, R) the negatives of position s are the rows ``index[s]`` of (U, D): no (S, R, D) tensor is made.
    """
    if index is not None:
        return sampled_logits(query, negatives.to(query.dtype), index)
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
    index: Tensor | None = None,
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
        negatives: (R, D) or (S, R, D), or (U, D) with ``index``.
        scale: Inverse temperature.
        collision: (S, R) bool, negatives that are the position's own label.
        index: (S, R) int64, rows of ``negatives``.
        log_q: (R,) or (S, R).
        positive_log_q: (S,).
    """
    query = query * scale  # S D products; of the logits it would be S R
    rest = {"collision": collision, "log_q": log_q, "positive_log_q": positive_log_q}
    if index is not None:
        return sampled_softmax_loss(query, positive, negatives.to(query.dtype), index, **rest)
    return softmax_of_logits((query * positive).sum(-1), negative_logits(query, negatives), **rest)


def binary_cross_entropy(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    scale: float,
    collision: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """SASRec's loss (Kang and McAuley 2018, network training), with the mean over negatives in place of their sum.

    Shapes as in ``sampled_softmax``. Collisions are left out of the average.
    """
    own = _exact((query * positive).sum(-1)) * scale
    others = _exact(negative_logits(query, negatives, index)) * scale
    kept = (~collision).to(others.dtype)
    return F.softplus(-own) + (F.softplus(others) * kept).sum(1) / kept.sum(1).clamp(min=1.0)


def _exact(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
