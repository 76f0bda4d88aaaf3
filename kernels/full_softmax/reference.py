"""The definition in plain torch: any float dtype, any device, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def full_softmax_reference(query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """``()`` weighted sum of the cross-entropies of (S, V) logits, in float32 at least."""
    logits = query @ vectors.T
    exact = torch.promote_types(logits.dtype, torch.float32)
    return (F.cross_entropy(logits.to(exact), target, reduction="none") * weight.to(exact)).sum()
