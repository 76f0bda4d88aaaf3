"""What a table is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gr.embedding.hashing import hashed, ids_of_rows, key_of


@dataclass(frozen=True)
class TableSpec:
    """One table: ``num_rows`` vectors of size ``dim``, drawn from a normal truncated at two deviations.

    Attributes:
        hashed_ids: Ids 0..hashed_ids-1 are hashed into the rows (``gr.embedding.hashing``); 0: an id is its row.
    """

    name: str
    num_rows: int
    dim: int
    init_std: float = 0.02
    hashed_ids: int = 0

    @property
    def num_ids(self) -> int:
        """How many ids may be asked for."""
        return self.hashed_ids or self.num_rows

    @cached_property
    def row_counts(self) -> np.ndarray:
        """(num_rows,) int64, how many ids have each row."""
        if not self.hashed_ids:
            return np.ones(self.num_rows, np.int64)
        return ids_of_rows(self.hashed_ids, self.num_rows, key_of(self.name))

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows (...,) int64 of ids (...,) int64."""
        return hashed(ids, self.num_rows, key_of(self.name)) if self.hashed_ids else ids

    def distinct_rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """(n,) ascending rows, those of the ids lo..hi-1 among them, and (hi - lo,) the place of each id's; ``None``:
        its own."""
        if not self.hashed_ids:
            return torch.arange(lo, hi), None
        if hi - lo >= self.num_rows:  # a superset, without sorting
            return torch.arange(self.num_rows), self.rows_of(torch.arange(lo, hi))
        return torch.unique(self.rows_of(torch.arange(lo, hi)), return_inverse=True)
