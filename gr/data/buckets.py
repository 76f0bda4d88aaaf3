"""A log cut by user into parts that each fit in memory; drops and counts that go over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.parse import ParsedLog
from gr.data.raw import Rules
from gr.data.spill import Scratch, Spill

_MOST_BUCKETS = 512  # each is an open file while the log is cut
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Bucket:
    """All rows of some neighbouring users.

    Attributes:
        users: First and past-the-last user, as places among the sorted ids.
        rows: Tables of ``user``, ``item`` (int32 places among the sorted ids), ``time``, ``position`` (int64)
            and ``action`` (int32), the last three where the log has them, in input order.
        dropped: Rows no longer wanted, one bit each; ``None``: no row was dropped.
    """

    users: tuple[int, int]
    rows: Spill
    dropped: np.ndarray | None = None

    def load(self, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """The rows that are left, in input order; ``user`` counts from the bucket's first.

        Args:
            names: Columns wanted; empty: all.
        """
        tables = [table.select(list(names)) if names else table for table in self.rows.read()]
        found = {
            name: np.concatenate([chunk.to_numpy() for table in tables for chunk in table[name].chunks])
            for name in tables[0].column_names
        }
        first, end = self.users
        small = np.uint16 if end - first <= 1 << 16 else np.int32  # numpy sorts 16 bits by radix
        found["user"] = (found["user"] - first).astype(small)
        keep = self.kept()
        return found if keep is None else {name: values[keep] for name, values in found.items()}

    def kept(self) -> np.ndarray | None:
        """(rows,) bool, or ``None`` if no row was dropped."""
        return None if self.dropped is None else ~np.unpackbits(self.dropped, count=self.rows.rows).view(bool)

    def drop(self, again: np.ndarray) -> None:
        """Drops more rows: ``again`` is (rows left,) bool."""
        if not again.any():
            return
        keep = self.kept()
        keep = np.ones(self.rows.rows, bool) if keep is None else keep
        keep[np.flatnonzero(keep)[again]] = False
        self.dropped = np.packbits(~keep)


@dataclass
class Counts:
    """Events left of each user and item, as places among the sorted ids: (U,) and (V,) int64."""

    user: np.ndarray
    item: np.ndarray

    @classmethod
    def of(cls, buckets: list[Bucket], num_users: int, num_items: int) -> Counts:
        """Counts the rows left in all buckets."""
        counts = cls(np.zeros(num_users, np.int64), np.zeros(num_items, np.int64))
        for bucket in buckets:
            counts.add(bucket, bucket.load(("user", "item")))
        return counts

    def add(self, bucket: Bucket, found: dict[str, np.ndarray]) -> None:
        """Counts rows of one bucket."""
        first, end = bucket.users
        self.user[first:end] += np.bincount(found["user"], minlength=end - first)
        self.item += np.bincount(found["item"], minlength=self.item.size)


def cut_by_user(
    log: ParsedLog,
    users: pa.Array,
    events: np.ndarray,
    items: pa.Array,
    codes: np.ndarray,
    scratch: Scratch,
    bucket_rows: int,
) -> list[Bucket]:
    """Cuts a log into buckets of about equal size; uses up ``log.rows``.

    Args:
        log: The parsed log.
        users: (U,) the distinct user ids in order.
        events: (U,) their events.
        items: (V,) the distinct item ids in order.
        codes: Final code of each raw action code.
        scratch: Where buckets go when there are several.
        bucket_rows: Rows of a bucket, but for its last user's, who is never cut.
    """
    before = np.cumsum(events) - events
    place = before // max(bucket_rows, -(-log.rows.rows // _MOST_BUCKETS))
    bucket_of = np.cumsum(np.diff(place, prepend=place[:1]) > 0)  # without the numbers that a big user skips
    edges = np.searchsorted(bucket_of, np.arange(bucket_of[-1] + 2))
    in_memory = log.rows.rows if edges.size == 2 else 0
    buckets = [Bucket((int(lo), int(hi)), Spill(scratch, in_memory)) for lo, hi in zip(edges, edges[1:], strict=False)]
    for table in log.rows.read():
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        row = {
            "user": pc.index_in(columns.pop("user_id").cast(users.type), value_set=users).to_numpy(),
            "item": pc.index_in(columns.pop("item_id").cast(items.type), value_set=items).to_numpy(),
        } | {name: values.to_numpy() for name, values in columns.items()}
        if "action" in row:
            row["action"] = codes[row["action"]].astype(np.int32)
        if len(buckets) == 1:
            buckets[0].rows.append(pa.table(row))
            continue
        to = bucket_of[row["user"]].astype(np.uint16)
        order = np.argsort(to, kind="stable")  # a bucket keeps the order of the input
        sorted_rows = pa.table({name: values[order] for name, values in row.items()})
        ends = np.cumsum(np.bincount(to, minlength=len(buckets)))
        for bucket, lo, hi in zip(buckets, np.concatenate([[0], ends]), ends, strict=False):
            if hi > lo:
                bucket.rows.append(sorted_rows.slice(int(lo), int(hi - lo)))
    log.rows.remove()
    for bucket in buckets:
        bucket.rows.finish()
    return buckets


def drop_duplicates(buckets: list[Bucket], counts: Counts) -> int:
    """Keeps the first of rows equal in all columns; fills ``counts``; returns how many rows went."""
    dropped = 0
    for bucket in buckets:
        found = bucket.load()
        again = repeated(list(found.values()))
        bucket.drop(again)
        dropped += int(again.sum())
        counts.add(bucket, {name: found[name][~again] for name in ("user", "item")})
    return dropped


def mixed(columns: list[np.ndarray]) -> np.ndarray:
    """(n,) uint64 that looks random and depends on nothing but the row's integers."""
    number = np.zeros(columns[0].size, np.uint64)
    for values in columns:
        number = (number ^ values.astype(np.int64).view(np.uint64)) * _ODD
        number ^= number >> np.uint64(32)
    return number


def repeated(columns: list[np.ndarray]) -> np.ndarray:
    """(n,) bool: the row equals an earlier one in all columns (integers)."""
    number = mixed(columns)
    ordered = np.sort(number)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    again = np.zeros(number.size, bool)
    if not twice.size:
        return again
    # Equal rows mix to equal numbers; whether rows of equal numbers are equal is seen here. Sorting these few costs
    # a tenth of sorting all rows by all columns.
    place = np.searchsorted(twice, number)
    rows = np.flatnonzero(twice[np.minimum(place, twice.size - 1)] == number)
    columns = [values[rows] for values in columns]
    order = np.lexsort(columns)  # stable, so that the first of equal rows comes first
    equal = np.ones(order.size - 1, bool)
    for values in columns:
        ordered = values[order]
        equal &= ordered[1:] == ordered[:-1]
    again[rows[order[1:][equal]]] = True
    return again


def drop_rare(buckets: list[Bucket], counts: Counts, rules: Rules) -> Counts:
    """Drops the rows of rare users and items (see ``Rules.core``); returns the new counts."""

    def rare() -> tuple[np.ndarray, np.ndarray]:
        return counts.user < rules.min_user_events, counts.item < rules.min_item_events

    rare_user, rare_item = rare()
    counts = _without(buckets, rare_user, rare_item)
    if rules.core == "once":
        return _without(buckets, rare()[0], np.zeros_like(rare_item))
    while True:
        rare_user, rare_item = rare()
        if not (counts.user[rare_user].any() or counts.item[rare_item].any()):
            return counts
        counts = _without(buckets, rare_user, rare_item)


def _without(buckets: list[Bucket], rare_user: np.ndarray, rare_item: np.ndarray) -> Counts:
    counts = Counts(np.zeros(rare_user.size, np.int64), np.zeros(rare_item.size, np.int64))
    for bucket in buckets:
        found = bucket.load(("user", "item"))
        again = rare_user[bucket.users[0] : bucket.users[1]][found["user"]] | rare_item[found["item"]]
        bucket.drop(again)
        counts.add(bucket, {name: values[~again] for name, values in found.items()})
    return counts
