"""A stack of layers, run with or without activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_layers(layers: Iterable[nn.Module], x: Tensor, *shared: Any, activation_checkpointing: bool) -> Tensor:
    """``layer(x, *shared)`` for one layer after another.

    Args:
        layers: Each gives a tensor of the shape of ``x``.
        x: The first one's input.
        shared: What all of them get beside it.
        activation_checkpointing: Of each layer only the input is kept for the backward pass, which runs the layer
            again, with the same dropout: the memory of one layer instead of all, for about a third more time
            (arXiv 1604.06174). Losses and gradients are the same.
    """
    again = activation_checkpointing and torch.is_grad_enabled()
    for layer in layers:
        x = checkpoint(layer, x, *shared, use_reentrant=False) if again else layer(x, *shared)
    return x
