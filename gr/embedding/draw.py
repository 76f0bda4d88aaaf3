"""First rows of a table, the same however it is divided."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gr.embedding.spec import TableSpec

Rows = Callable[[int, int], Tensor]

WHOLE_DRAW = 2**28
"""Tables of up to so many numbers (1 GiB) are drawn whole, even where only some rows are kept."""
BLOCK_ROWS = 2**16
"""Rows of a larger table that one generator draws."""


def draw(spec: TableSpec) -> Rows:
    """Draws a table from a normal truncated at two deviations.

    Returns:
        ``(lo, hi) -> (hi - lo, dim)`` float32 rows. torch's generator stands afterwards where it stands for every other
        division of the table; rows of a table beyond ``WHOLE_DRAW`` cost what was asked for and no more.
    """
    if spec.num_rows * spec.dim <= WHOLE_DRAW:
        whole = _truncated(torch.empty(spec.num_rows, spec.dim), spec, None)
        return lambda lo, hi: whole[lo:hi]
    key = int(torch.randint(2**62, ()))

    def rows(lo: int, hi: int) -> Tensor:
        found = torch.empty(hi - lo, spec.dim)
        for block in range(lo // BLOCK_ROWS, -(-hi // BLOCK_ROWS)):
            start = block * BLOCK_ROWS
            size = min(BLOCK_ROWS, spec.num_rows - start)
            generator = torch.Generator().manual_seed((key + block) % 2**63)
            drawn = _truncated(torch.empty(size, spec.dim), spec, generator)
            first, last = max(lo, start), min(hi, start + size)
            found[first - lo : last - lo] = drawn[first - start : last - start]
        return found

    return rows


def _truncated(weight: Tensor, spec: TableSpec, generator: torch.Generator | None) -> Tensor:
    std = spec.init_std
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
