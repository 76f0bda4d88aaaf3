"""Columns of a user's file as exact integers and strings: ids, times, positions, actions.

CSV columns arrive as text and are parsed here, so that no reader guesses a type; ids never pass through
floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.errors import UserError

TimeUnit = Literal["s", "ms", "us", "ns"]
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_LARGEST_SECOND = 10**11  # the year 5138: anything later is milliseconds
_MOST_ACTIONS = 4096


@dataclass(frozen=True)
class Where:
    """Names a column in errors.

    Attributes:
        file: Path of the file.
        column: Name of the column.
        rows: (n,) row numbers as the user counts them (1 is the first row of data), of the values passed
            along.
    """

    file: str
    column: str
    rows: np.ndarray

    def bad(self, place: int, values: pa.Array, right: str) -> UserError:
        """The error about one value."""
        return UserError(
            f"{self.file}: column {self.column!r} holds {values[place].as_py()!r} "
            f"in row {int(self.rows[place])} (the first row of data is 1); {right}"
        )


def ids(values: pa.Array, where: Where) -> pa.Array:
    """Ids as int64 where every one is a plain integer ("007" is not), else as strings; no nulls come in.

    Raises:
        UserError: The column is neither integer nor text.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return ids(values.cast(kind.value_type), where)
    if pa.types.is_integer(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid:
            return values.cast(pa.string())  # uint64 above 2**63
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        values = values.cast(pa.string())
        try:
            whole = values.cast(pa.int64())
        except pa.ArrowInvalid:
            return values
        return whole if whole.cast(pa.string()).equals(values) else values
    raise UserError(
        f"{where.file}: id column {where.column!r} is of type {kind}; ids must be integers or text "
        "(a float cannot hold an id above 2**53)"
    )


def dense(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """((n,) int64 place of each value among the sorted distinct ones, those distinct ones)."""
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    place = np.empty(len(order), np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    return place[encoded.indices.to_numpy()], encoded.dictionary.take(order)


def times(values: pa.Array, unit: TimeUnit, where: Where) -> tuple[np.ndarray, np.ndarray]:
    """Times in seconds, and in the finest unit the file has, to sort by.

    Args:
        values: Integers, whole floats, Arrow dates or timestamps (without a zone: UTC), or text of one of
            these (ISO 8601 for the last).
        unit: Unit of numbers; dates and timestamps know their own.
        where: For errors.

    Returns:
        (n,) int64 seconds since 1970, rounded down; (n,) int64 sort key.
    """
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        first = values[0].as_py().strip() if len(values) else "0"
        if _is_number(first):
            values = _parse(values, _whole, where, "a time must be a whole number of seconds or an ISO date")
        else:
            values = _parse(
                values,
                _iso,
                where,
                "a time must be a whole number or an ISO date such as 2024-05-31T12:00:00",
            )
        kind = values.type
    if pa.types.is_date(kind):
        values, kind = values.cast(pa.timestamp("s")), pa.timestamp("s")
    if pa.types.is_timestamp(kind):
        unit, key = kind.unit, values.cast(pa.int64()).to_numpy()
    else:
        key = whole_numbers(values, where, "a time must be a whole number of seconds or a date")
    seconds = key // _PER_SECOND[unit]
    if seconds.size and np.abs(seconds).max() > _LARGEST_SECOND:
        place = int(np.abs(seconds).argmax())
        raise where.bad(
            place, values, "read as seconds it lies beyond the year 5000, so set timestamp_unit: ms, us or ns"
        )
    return seconds, key


def whole_numbers(values: pa.Array, where: Where, right: str) -> np.ndarray:
    """(n,) int64 from integers, floats that are whole, or text of these; ``right`` ends the error's
    sentence."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = _parse(values, _whole, where, right)
    if pa.types.is_uint64(values.type):
        values = _parse(values.cast(pa.string()), _whole, where, right)  # names the value beyond 2**63
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(values.type):
        number = values.cast(pa.float64()).to_numpy()
        bad = ~np.isfinite(number) | (number != np.floor(number)) | (np.abs(number) > 2.0**53)
        if bad.any():
            raise where.bad(int(bad.argmax()), values, right)
        return number.astype(np.int64)
    raise UserError(f"{where.file}: column {where.column!r} is of type {kind}; {right}")


def categories(values: pa.Array, where: Where) -> tuple[np.ndarray, list[object]]:
    """((n,) int64 dense codes, their meanings in order): numbers sort as numbers, text as text."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        for kind in (pa.int64(), pa.float64()):
            try:
                values = values.cast(kind)
                break
            except pa.ArrowInvalid:
                continue
    codes, meanings = dense(values)
    if len(meanings) > _MOST_ACTIONS:
        raise UserError(
            f"{where.file}: action column {where.column!r} has {len(meanings)} different values; "
            f"actions are kinds of event or ratings, at most {_MOST_ACTIONS}"
        )
    return codes, meanings.to_pylist()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(values: pa.Array) -> pa.Array:
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        number = values.cast(pa.float64())
        if not pc.all(pc.equal(pc.floor(number), number)).as_py():
            raise
        if pc.any(pc.greater(pc.abs(number), 2.0**53)).as_py():
            raise
        return number.cast(pa.int64())


def _iso(values: pa.Array) -> pa.Array:
    try:
        return values.cast(pa.timestamp("us"))
    except pa.ArrowInvalid:
        return values.cast(pa.timestamp("us", tz="UTC"))  # text that names its zone


def _parse(values: pa.Array, parse: Callable[[pa.Array], pa.Array], where: Where, right: str) -> pa.Array:
    values = pc.utf8_trim_whitespace(values)
    try:
        return parse(values)
    except pa.ArrowInvalid:
        lo, hi = 0, len(values)  # halve down to the first value that does not parse
        while hi - lo > 1:
            middle = (lo + hi) // 2
            try:
                parse(values[lo:middle])
                lo = middle
            except pa.ArrowInvalid:
                hi = middle
        raise where.bad(lo, values, right) from None
