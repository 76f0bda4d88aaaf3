"""Parameters into groups, groups into AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gr.distributed.engine import table_parameters
from gr.training.config import OptimizerConfig


def split_parameters(model: nn.Module, chosen: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(dense, table) parameters among the chosen; tables are those in ``model.table_parameters()``."""
    tables = {id(parameter) for parameter in table_parameters(model)}
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
