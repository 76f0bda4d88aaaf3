"""The update rules of tables that own their optimizer, over whole gradients: the specification of the fused ones.

Without decay a row whose gradient is zero stays as it is under each of them, so that touching only the rows of a batch,
as fused optimizers do, is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr.embedding.config import TableOptimizerConfig
from gr.embedding.spec import TableSpec


def new_sums(kind: str, spec: TableSpec) -> Tensor | None:
    """Sums of squares before the first step: (rows, dim), (rows,), or none; float32."""
    shapes = {"adagrad": (spec.num_rows, spec.dim), "rowwise_adagrad": (spec.num_rows,)}
    return torch.zeros(shapes[kind]) if kind in shapes else None


@torch.no_grad()
def update(weight: Tensor, grad: Tensor, sums: Tensor | None, cfg: TableOptimizerConfig, lr: float) -> None:
    """One step in place on (rows, dim) float32 weights and on their sums of squares."""
    if sums is None:
        weight.sub_(grad, alpha=lr)
        return
    squares = grad.square()
    sums.add_(squares if cfg.kind == "adagrad" else squares.mean(1))
    root = sums.sqrt().add_(cfg.eps)
    weight.addcdiv_(grad, root if cfg.kind == "adagrad" else root[:, None], value=-lr)
