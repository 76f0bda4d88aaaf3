"""Embedding tables in one process's memory: the specification that sharded tables are tested against.

Tables are asked for ids once a step (tokens, labels and negatives together) and hand out vectors. Nobody else touches
their weights: full softmax and evaluation go through ``full_softmax``, ``logits`` and ``iter_vectors``, which a
sharded table answers shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr.kernels.full_softmax import full_softmax_loss

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TableSpec:
    """One table: ``num_rows`` vectors of size ``dim``, drawn from a normal truncated at two deviations."""

    name: str
    num_rows: int
    dim: int
    init_std: float = 0.02


class LocalTables(nn.Module):
    """Dense tables under ordinary autograd.

    Args:
        specs: The tables.
    """

    def __init__(self, specs: tuple[TableSpec, ...]) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in specs}
        self.weights = nn.ParameterDict()
        for spec in specs:
            weight = torch.empty(spec.num_rows, spec.dim)
            nn.init.trunc_normal_(weight, std=spec.init_std, a=-2 * spec.init_std, b=2 * spec.init_std)
            self.weights[spec.name] = nn.Parameter(weight)

    def forward(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors of ids: table name -> int64 ids of any shape (...,) gives (..., dim)."""
        return {name: nn.functional.embedding(rows, self.weights[name]) for name, rows in ids.items()}

    def logits(self, query: Tensor, table: str, item_range: tuple[int, int], transform: Transform) -> Tensor:
        """(S, hi - lo) inner products of queries (S, dim) with the transformed rows lo..hi-1 of a table."""
        lo, hi = item_range
        return query @ transform(self.weights[table][lo:hi]).T

    def full_softmax(self, query: Tensor, table: str, target: Tensor, weight: Tensor, transform: Transform) -> Tensor:
        """() weighted sum of the cross-entropies of targets (S,) among all transformed rows of a table."""
        return full_softmax_loss(query, transform(self.weights[table]).to(query.dtype), target, weight)

    def iter_vectors(self, table: str, block: int = 65_536) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, (rows, dim) vectors) over a whole table."""
        weight = self.weights[table]
        for lo in range(0, weight.shape[0], block):
            yield lo, weight[lo : lo + block]
