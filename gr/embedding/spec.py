"""What a table is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TableSpec:
    """One table: ``num_rows`` vectors of size ``dim``, drawn from a normal truncated at two deviations."""

    name: str
    num_rows: int
    dim: int
    init_std: float = 0.02
