"""A source's raw batches, parsed one by one and put aside until the whole log has been seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gr.data import columns
from gr.data.columns import Categories, Times, Where
from gr.data.raw import RawLog, Rules
from gr.data.spill import Distinct, Scratch, Spill
from gr.errors import UserError

ROWS_A_BATCH = 1 << 20


@dataclass
class ParsedLog:
    """Rows of a log in input order, parsed; nothing dropped but rows with nulls.

    Attributes:
        rows: Tables of ``user_id``, ``item_id`` (int64, and text from the first part on that is not), ``time``
            (int64 in the unit of ``times``), ``position`` (int64), ``action`` (int32 raw code); the last three
            where the log has them.
        users: Distinct user ids and their counts.
        items: Distinct item ids and their counts.
        times: Knows the unit of the times.
        actions: Knows the meaning of the action codes; ``None`` without actions.
        rows_read: All rows of the input.
        null_rows: Those dropped for an empty value.
    """

    rows: Spill
    users: Distinct
    items: Distinct
    times: Times
    actions: Categories | None
    rows_read: int = 0
    null_rows: int = 0


def parse_log(raw: RawLog, rules: Rules, scratch: Scratch, in_memory: int) -> ParsedLog:
    """Reads all batches of a source.

    Args:
        raw: The source's log; its batches are used up.
        rules: Gives the unit of times.
        scratch: Where rows go that do not fit.
        in_memory: Rows to keep in memory at most.

    Raises:
        UserError: A value or column is wrong, or no row is whole, or the disk is full.
    """
    log = ParsedLog(
        rows=Spill(scratch, in_memory),
        users=Distinct(),
        items=Distinct(),
        times=Times(rules.timestamp_unit),
        actions=Categories() if "action" in raw.names else None,
    )
    for batch in raw.batches:
        for lo in range(0, batch.num_rows, ROWS_A_BATCH):
            part = batch.slice(lo, ROWS_A_BATCH)
            log.null_rows += part.num_rows - _parse_part(part, raw, log)
            log.rows_read += part.num_rows
    if not log.rows_read:
        raise UserError(f"{raw.source} has no rows of data")
    if log.null_rows == log.rows_read:
        raise UserError(
            f"{raw.source}: every row has an empty value in one of the columns {', '.join(raw.names.values())}"
        )
    log.rows.finish()
    return log


def _parse_part(part: pa.RecordBatch | pa.Table, raw: RawLog, log: ParsedLog) -> int:
    """Adds the whole rows of a part to ``log``; returns how many they are."""
    found = {name: _array(part.column(name)) for name in raw.names}
    whole = np.ones(part.num_rows, bool)
    for values in found.values():
        if values.null_count or pa.types.is_floating(values.type):
            whole &= ~values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(whole) + log.rows_read + 1
    if not rows.size:
        return 0
    if rows.size < part.num_rows:
        found = {name: values.filter(pa.array(whole)) for name, values in found.items()}
    parsed: dict[str, pa.Array | np.ndarray] = {}
    for name, values in found.items():
        where = Where(raw.source, raw.names[name], rows, raw.locate)
        if name in ("user_id", "item_id"):
            distinct = log.users if name == "user_id" else log.items
            parsed[name] = distinct.add(columns.ids(values, where))
        elif name == "timestamp":
            parsed["time"] = log.times.parse(values, where)
        elif name == "position":
            parsed[name] = columns.whole_numbers(values, where, "a position must be a whole number")
        else:
            assert name == "action" and log.actions is not None, name
            parsed[name] = log.actions.parse(values, where)
    log.rows.append(pa.table(parsed))
    return int(rows.size)


def _array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
