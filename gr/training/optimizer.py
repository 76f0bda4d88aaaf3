"""Parameters into groups, groups into AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gr.training.config import OptimizerConfig


def split_parameters(model: nn.Module, chosen: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(dense, table) parameters among the chosen; tables are those in ``model.table_parameters()``."""
    listed = model.table_parameters() if hasattr(model, "table_parameters") else []
    tables = {id(parameter) for parameter in listed}
    dense = [parameter for parameter in chosen if id(parameter) not in tables]
    return dense, [parameter for parameter in chosen if id(parameter) in tables]


def make_optimizer(
    dense: Sequence[nn.Parameter], tables: Sequence[nn.Parameter], cfg: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW in three groups: decayed matrices, undecayed vectors, tables.

    Each group carries ``base_lr``, which the schedule multiplies. Decay on biases and norms pulls scales to
    zero for no gain; on tables it would shrink items that are seldom seen.
    """
    groups = [
        {"params": [p for p in dense if p.dim() >= 2], "base_lr": cfg.lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in dense if p.dim() < 2], "base_lr": cfg.lr, "weight_decay": 0.0},
        {"params": list(tables), "base_lr": cfg.lr * cfg.table_lr_factor, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to its base times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def update_if_finite(optimizer: torch.optim.Optimizer, numbers: Tensor) -> None:
    """One update, unless one of ``numbers`` is not finite: the weights then stay those that led there.

    On a GPU nobody waits for the numbers, so the next steps are taken before anybody looks; they update nothing either.
    (Only fused optimizers of plain tensors can be held back there.)
    """
    if numbers.device.type == "cpu":
        if bool(torch.isfinite(numbers).all()):
            optimizer.step()
        return
    _hold(optimizer, ~torch.isfinite(numbers).all())
    optimizer.step()


def _hold(optimizer: torch.optim.Optimizer, broken: Tensor) -> None:
    """From a ``broken`` step on, a fused optimizer updates nothing: torch's gradient scaling asks for the same."""
    plain = not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if plain and optimizer.defaults.get("fused"):
        broken = broken.float()
        before = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = broken if before is None else torch.maximum(before, broken)
