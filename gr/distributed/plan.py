"""Who holds which part of which table: a function of sizes and the number of ranks, computed without any device."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from gr.embedding.config import TablesConfig
from gr.embedding.spec import TableSpec
from gr.errors import UserError

# Fused kernels read rows in vectors of this many numbers.
COLUMN_MULTIPLE = 4


@dataclass(frozen=True)
class Shard:
    """Rows ``row``..``row + rows - 1`` and columns ``col``..``col + cols - 1`` of a table, on one rank."""

    rank: int
    row: int
    rows: int
    col: int
    cols: int


@dataclass(frozen=True)
class TablePlan:
    """A table and its shards.

    Attributes:
        spec: The table.
        sharding: ``row_wise``, ``table_wise`` or ``column_wise``.
        shards: In order of ranks; together the whole table, no number twice.
    """

    spec: TableSpec
    sharding: str
    shards: tuple[Shard, ...]


def plan_tables(specs: Sequence[TableSpec], config: TablesConfig, world: int) -> tuple[TablePlan, ...]:
    """Divides tables among ``world`` ranks.

    ``row_wise`` gives rank r the rows from r * ceil(V / world) on; a table too small to give each rank a row stays
    whole. ``column_wise`` gives each rank the same number of columns. Whole tables go, largest first, to the rank that
    holds the fewest numbers so far.

    Raises:
        UserError: A constraint names no table, or columns that this many ranks cannot share.
    """
    unknown = sorted(set(config.constraints) - {spec.name for spec in specs})
    if unknown:
        raise UserError(
            f"distributed.tables.constraints names table {unknown[0]!r}; "
            f"this model has {', '.join(spec.name for spec in specs)}"
        )
    chosen = {spec.name: _sharding(spec, config, world) for spec in specs}
    plans = {spec.name: _divided(spec, chosen[spec.name], world) for spec in specs if chosen[spec.name] != "table_wise"}
    held = [0] * world
    for plan in plans.values():
        for shard in plan.shards:
            held[shard.rank] += shard.rows * shard.cols
    least = [(size, rank) for rank, size in enumerate(held)]
    heapq.heapify(least)
    for spec in sorted(specs, key=lambda spec: (-spec.num_rows * spec.dim, spec.name)):
        if chosen[spec.name] == "table_wise":
            size, rank = least[0]
            heapq.heapreplace(least, (size + spec.num_rows * spec.dim, rank))
            plans[spec.name] = TablePlan(spec, "table_wise", (Shard(rank, 0, spec.num_rows, 0, spec.dim),))
    return tuple(plans[spec.name] for spec in specs)


def row_block(num_rows: int, world: int) -> int:
    """Rows of each rank of a row-wise table but the last ones: ``ceil(num_rows / world)``."""
    return -(-num_rows // world)


def slice_of(num_rows: int, world: int, rank: int) -> tuple[int, int]:
    """(lo, hi) rows that a rank scores, however the table is divided; those it holds where that is by rows."""
    block = row_block(num_rows, world)
    return min(rank * block, num_rows), min((rank + 1) * block, num_rows)


def _sharding(spec: TableSpec, config: TablesConfig, world: int) -> str:
    asked = config.sharding_of(spec.name)
    if asked == "row_wise" and row_block(spec.num_rows, world) * (world - 1) >= spec.num_rows:
        return "table_wise"  # the last rank would have no row
    if asked == "column_wise" and (spec.dim % world or spec.dim // world % COLUMN_MULTIPLE):
        raise UserError(
            f"table {spec.name!r} has {spec.dim} columns, which {world} ranks cannot share in equal multiples of "
            f"{COLUMN_MULTIPLE}; set distributed.tables.sharding to row_wise, or choose another number of ranks"
        )
    return asked


def _divided(spec: TableSpec, sharding: str, world: int) -> TablePlan:
    if sharding == "row_wise":
        spans = [slice_of(spec.num_rows, world, rank) for rank in range(world)]
        shards = (Shard(rank, lo, hi - lo, 0, spec.dim) for rank, (lo, hi) in enumerate(spans))
    else:
        cols = spec.dim // world
        shards = (Shard(rank, 0, spec.num_rows, rank * cols, cols) for rank in range(world))
    return TablePlan(spec, sharding, tuple(shards))
