"""Columns of a user's file as exact integers and strings: ids, times, positions, actions.

A log comes in parts, so what holds for a whole column (the form of its times, the codes of its actions) is kept
from part to part. CSV columns arrive as text and are parsed here, so that no reader guesses a type; ids never
pass through floating point.
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
        rows: (n,) numbers of the rows of the values passed along; 1 is the first row of data of the log.
        locate: Such a number to the file it is from and its row there, for a log of several files.
    """

    file: str
    column: str
    rows: np.ndarray
    locate: Callable[[int], tuple[str, int]] | None = None

    def bad(self, place: int, values: pa.Array, right: str) -> UserError:
        """The error about one value."""
        row = int(self.rows[place])
        file, row = self.locate(row) if self.locate else (self.file, row)
        return UserError(
            f"{file}: column {self.column!r} holds {values[place].as_py()!r} "
            f"in row {row} (the first row of data is 1); {right}"
        )

    def wrong(self, reason: str) -> UserError:
        """The error about the column as a whole."""
        file = self.locate(int(self.rows[0]))[0] if self.locate and self.rows.size else self.file
        return UserError(f"{file}: column {self.column!r} {reason}")


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
    raise where.wrong(f"is of type {kind}; ids must be integers or text (a float cannot hold an id above 2**53)")


def dense(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """((n,) int64 place of each value among the sorted distinct ones, those distinct ones)."""
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    place = np.empty(len(order), np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    return place[encoded.indices.to_numpy()], encoded.dictionary.take(order)


class Times:
    """Parses a column of times that comes in parts: what the first part is, all are.

    Args:
        unit: Unit of numbers; dates and timestamps know their own.

    Attributes:
        unit: Unit of the keys: the given one for numbers, else the finest that the file has.
    """

    def __init__(self, unit: TimeUnit) -> None:
        self.unit = unit
        self._form: str | None = None

    def parse(self, values: pa.Array, where: Where) -> np.ndarray:
        """(n,) int64 times since 1970 in ``self.unit``.

        Args:
            values: Integers, whole floats, Arrow dates or timestamps (without a zone: UTC), or text of one of
                these (ISO 8601 for the last); no nulls, one value at least.
            where: For errors.

        Raises:
            UserError: A value is no time, or lies beyond the years -1199 to 5138.
        """
        kind = values.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            form = self._form or ("numbers" if _is_number(values[0].as_py().strip()) else _iso_form(values))
            values = _parse(values, *_TEXT_TIMES.get(form, _TEXT_TIMES["numbers"]), where)
        elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            form = "dates"
        else:
            form = "numbers"
        if pa.types.is_date(values.type):
            values = values.cast(pa.timestamp("s"))
        unit = values.type.unit if pa.types.is_timestamp(values.type) else self.unit
        if self._form is not None and (form, unit) != (self._form, self.unit):
            raise where.wrong(f"is of type {kind}, unlike in the files before; times must be of one type in all files")
        self._form, self.unit = form, unit
        if pa.types.is_timestamp(values.type):
            key = values.cast(pa.int64()).to_numpy()
        else:
            key = whole_numbers(values, where, "a time must be a whole number of seconds or a date")
        seconds = self.seconds(key)
        absurd = (seconds > _LARGEST_SECOND) | (seconds < -_LARGEST_SECOND)
        if absurd.any():
            raise where.bad(
                int(absurd.argmax()),
                values,
                "read as seconds it lies beyond the year 5000 or before -1000, so set timestamp_unit: ms, us or ns, "
                "or mend it",
            )
        return key

    def seconds(self, key: np.ndarray) -> np.ndarray:
        """(n,) int64 seconds since 1970, rounded down."""
        return key // _PER_SECOND[self.unit]


class Categories:
    """Codes a column of actions that comes in parts.

    Codes go by first appearance until ``finish`` says what they mean.
    """

    _MOST_RAW = 1 << 16

    def __init__(self) -> None:
        self._raw: pa.Array | None = None
        self._where: Where | None = None

    def parse(self, values: pa.Array, where: Where) -> np.ndarray:
        """(n,) int32 codes.

        Raises:
            UserError: More different values than actions can have, or another type than before.
        """
        kind = values.type
        if pa.types.is_dictionary(kind):
            values = values.cast(kind.value_type)
        if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
            values = values.cast(pa.string())
        elif pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
            values = values.cast(pa.float64())
        elif pa.types.is_boolean(values.type) or (pa.types.is_integer(values.type) and values.type != pa.uint64()):
            values = values.cast(pa.int64())
        if values.type not in (pa.string(), pa.float64(), pa.int64(), pa.uint64()):
            raise where.wrong(f"is of type {kind}; actions must be numbers or text")
        if self._raw is None:
            self._raw, self._where = values[:0], where
        if values.type != self._raw.type:
            raise where.wrong(f"is of type {kind}, unlike in the files before; it must be of one type in all files")
        codes = pc.index_in(values, value_set=self._raw)
        if codes.null_count:
            self._raw = pa.concat_arrays([self._raw, values.filter(codes.is_null()).unique()])
            if len(self._raw) > self._MOST_RAW:
                raise _too_many(where, f"more than {self._MOST_RAW}")
            codes = pc.index_in(values, value_set=self._raw)
        return codes.to_numpy()

    def finish(self) -> tuple[np.ndarray, list[object]]:
        """((n,) int64 final code of each code, the final codes' meanings): numbers sort as numbers, text as text."""
        assert self._raw is not None and self._where is not None
        values = self._raw
        if pa.types.is_string(values.type):
            for kind in (pa.int64(), pa.float64()):
                try:
                    values = values.cast(kind)
                    break
                except pa.ArrowInvalid:
                    continue
        codes, meanings = dense(values)
        if len(meanings) > _MOST_ACTIONS:
            raise _too_many(self._where, str(len(meanings)))
        return codes, meanings.to_pylist()


def whole_numbers(values: pa.Array, where: Where, right: str) -> np.ndarray:
    """(n,) int64 from integers, floats that are whole, or text of these; ``right`` ends the error's
    sentence."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = _parse(values.cast(pa.string()), _whole, right, where)
    if pa.types.is_uint64(values.type):
        values = _parse(values.cast(pa.string()), _whole, right, where)  # names the value beyond 2**63
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(values.type):
        number = values.cast(pa.float64()).to_numpy()
        bad = ~np.isfinite(number) | (number != np.floor(number)) | (np.abs(number) > 2.0**53)
        if bad.any():
            raise where.bad(int(bad.argmax()), values, right)
        return number.astype(np.int64)
    raise where.wrong(f"is of type {kind}; {right}")


def _too_many(where: Where, count: str) -> UserError:
    return where.wrong(f"has {count} different values; actions are kinds of event or ratings, at most {_MOST_ACTIONS}")


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


def _iso_form(values: pa.Array) -> str:
    first = pc.utf8_trim_whitespace(values[:1])
    for form in ("dates", "dates with a zone"):
        try:
            _TEXT_TIMES[form][0](first)
            return form
        except pa.ArrowInvalid:
            continue
    return "dates"  # the error will name the first value


def _parse(values: pa.Array, parse: Callable[[pa.Array], pa.Array], right: str, where: Where) -> pa.Array:
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


_DATE = "a time must be a whole number or an ISO date such as 2024-05-31T12:00:00"
_TEXT_TIMES: dict[str, tuple[Callable[[pa.Array], pa.Array], str]] = {
    "numbers": (_whole, "a time must be a whole number of seconds or an ISO date"),
    "dates": (lambda values: values.cast(pa.timestamp("us")), f"{_DATE}, with a zone in every row or in none"),
    "dates with a zone": (lambda values: values.cast(pa.timestamp("us", tz="UTC")), f"{_DATE}Z, each with its zone"),
}
