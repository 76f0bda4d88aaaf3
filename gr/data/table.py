"""A user's own CSV or Parquet file, read into an EventLog and prepared into a store."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from gr.data import columns
from gr.data.columns import TimeUnit, Where
from gr.data.store import SHARD_USERS, Chunk, write_store
from gr.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class ItemTableConfig:
    """A table with one row an item.

    Attributes:
        path: CSV or Parquet.
        id: Its column of item ids, as in the log.
        title: Its column of titles.
        columns: Further columns to keep.
        candidates: ``log``: only items of the log can be recommended; ``all``: every item of this table too.
    """

    path: str
    id: str = "item_id"
    title: str = "title"
    columns: tuple[str, ...] = ()
    candidates: Literal["log", "all"] = "log"


@dataclass(frozen=True)
class TableConfig:
    """A log of events, one row an event.

    Attributes:
        path: ``.csv``, ``.tsv`` (each also ``.gz``), ``.parquet`` or ``.pq``.
        user: Column of user ids, integers or text.
        item: Column of item ids, integers or text.
        timestamp: Column of times; ``None``: ``timestamp`` if the file has it.
        position: Column of places in the user's order; breaks ties in time, or stands alone when the file has
            no times. ``None``: ``position`` if the file has it and there is no time column.
        action: Column of actions or ratings; each distinct value becomes one action.
        timestamp_unit: Unit of numeric times.
        names: Column names of a CSV without a header line.
        items: Table of titles.
        duplicates: ``drop`` keeps the first of rows equal in all of these columns, ``keep`` keeps all.
        min_user_events: Users with fewer events are dropped.
        min_item_events: Items with fewer are. Both are counted once on the whole log, then users are counted
            again, as arXiv 2402.17152's code does with 5 and 5; this is no iterated core.
        caveats: Sentences printed beside every number made from this log.
    """

    path: str
    kind: str = "table"
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = None
    position: str | None = None
    action: str | None = None
    timestamp_unit: TimeUnit = "s"
    names: tuple[str, ...] = ()
    items: ItemTableConfig | None = None
    duplicates: Literal["keep", "drop"] = "drop"
    min_user_events: int = 1
    min_item_events: int = 1
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("min_user_events", "min_item_events"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class EventLog:
    """Rows of a log in input order, parsed; nothing dropped but rows with nulls.

    Attributes:
        table: ``user_id`` and ``item_id`` (int64 or string), ``timestamp`` (int64 s) and ``position``
            (int64), at least one of these two, and ``action`` (int64 code) where named.
        order_key: (n,) int64 time in the file's finest unit, or the position: what the log is sorted by.
        actions: Meanings of the action codes.
        repairs: What was mended, counted.
    """

    table: pa.Table
    order_key: np.ndarray
    actions: list[Any]
    repairs: dict[str, int]


class Table:
    """The source of ``kind: table``."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config

    def fingerprint(self) -> str:
        """sha256 over the files' contents, so that a changed file is prepared anew and a moved one is not."""
        digest = hashlib.sha256()
        for path in [self.config.path] + ([self.config.items.path] if self.config.items else []):
            _check_file(Path(path))
            with Path(path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def prepare(self, folder: str | Path) -> None:
        """Writes the store of this log into ``folder``.

        Raises:
            UserError: The file or a column is missing or wrong, or no user has 2 events.
        """
        config = self.config
        log = read_log(config)
        repairs = dict(log.repairs)
        key = log.order_key
        keep = _kept_rows(log, config, repairs)
        user_ids, item_ids = log.table["user_id"].combine_chunks(), log.table["item_id"].combine_chunks()
        user, users = columns.dense(user_ids.filter(pa.array(keep)))
        by_user = np.argsort(user, kind="stable")
        same = user[by_user][1:] == user[by_user][:-1]
        key = key[keep]
        repairs["out_of_order_rows_sorted"] = int((same & (np.diff(key[by_user]) < 0)).sum())
        # Stable: rows that tie keep the order of the file, which decides what a split holds out.
        keys = [key, user]
        if "timestamp" in log.table.column_names and "position" in log.table.column_names:
            keys.insert(0, log.table["position"].to_numpy()[keep])
        order = np.lexsort(keys)
        lengths = np.bincount(user, minlength=len(users))
        if not (lengths >= 2).any():
            raise UserError(f"{config.path}: no user has 2 events, so there is nothing to learn from or to test with")
        repairs["one_event_users_not_evaluated"] = int((lengths == 1).sum())
        item, items = self._items(item_ids.filter(pa.array(keep)))
        flat = {"item_id": item[order]}
        for name in ("timestamp", "action"):
            if name in log.table.column_names:
                flat[name] = log.table[name].to_numpy()[keep][order]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        manifest = {
            "source": Path(config.path).name,
            "caveats": list(config.caveats),
            "repairs": repairs,
            "num_actions": len(log.actions),
            "actions": log.actions,
            "counts": {"rows_read": log.table.num_rows + repairs["null_rows_dropped"]},
        }
        write_store(folder, _chunks(users, offsets, flat), items, manifest)

    def _items(self, item_ids: pa.Array) -> tuple[np.ndarray, pa.Table]:
        """((n,) dense item of each row, the item table)."""
        config = self.config.items
        if config is None:
            item, ids = columns.dense(item_ids)
            return item, pa.table({"item_id": ids, "title": ids.cast(pa.string())})
        source = _read(Path(config.path), (config.id, config.title, *config.columns), ())
        known = source[config.id].combine_chunks()
        where = Where(config.path, config.id, np.arange(1, len(known) + 1))
        if known.null_count:
            raise UserError(f"{config.path}: column {config.id!r} has an empty id in {known.null_count} rows")
        known = columns.ids(known, where)
        if known.type != item_ids.type:  # one file says 7, the other also says "7a": both are text then
            known, item_ids = known.cast(pa.string()), item_ids.cast(pa.string())
        repeated = len(known) - len(known.unique())
        if repeated:
            raise UserError(
                f"{config.path}: column {config.id!r} names {repeated} items twice; one row an item is right"
            )
        everything = pa.concat_arrays([item_ids, known]) if config.candidates == "all" else item_ids
        item, ids = columns.dense(everything)
        row = pc.index_in(ids, value_set=known)
        if row.null_count == len(row):
            raise UserError(
                f"{config.path}: none of the log's items stands in column {config.id!r} "
                f"(the log has {ids[0].as_py()!r}, this table {known[0].as_py()!r})"
            )
        title = source[config.title].combine_chunks().cast(pa.string()).take(row)
        table = {"item_id": ids, "title": pc.coalesce(title, ids.cast(pa.string()))}
        table |= {name: source[name].combine_chunks().take(row) for name in config.columns}
        return item[: len(item_ids)], pa.table(table)


def read_log(config: TableConfig) -> EventLog:
    """Reads and parses the columns that a config names.

    Raises:
        UserError: As ``Table.prepare``.
    """
    path = Path(config.path)
    present = _column_names(path, config.names)
    timestamp = config.timestamp or ("timestamp" if "timestamp" in present else None)
    position = config.position or ("position" if timestamp is None and "position" in present else None)
    if timestamp is None and position is None:
        raise UserError(
            f"{path}: the log has neither times nor positions (its columns are {', '.join(present)}); times "
            "are never invented: name a `position` column in data.position or a `timestamp` column in "
            "data.timestamp"
        )
    named = {"user_id": config.user, "item_id": config.item, "timestamp": timestamp, "position": position}
    named = {name: column for name, column in (named | {"action": config.action}).items() if column}
    table = _read(path, tuple(named.values()), config.names)
    if not table.num_rows:
        raise UserError(f"{path} has no rows of data")
    raw = {name: table[column].combine_chunks() for name, column in named.items()}
    whole = np.ones(table.num_rows, bool)
    for values in raw.values():
        whole &= ~values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(whole) + 1
    repairs = {"null_rows_dropped": int(table.num_rows - rows.size)}
    if not rows.size:
        raise UserError(f"{path}: every row has an empty value in one of the columns {', '.join(named.values())}")
    raw = {name: values.filter(pa.array(whole)) for name, values in raw.items()}
    parsed: dict[str, Any] = {}
    actions: list[Any] = []
    key: np.ndarray | None = None
    for name, values in raw.items():
        where = Where(str(path), named[name], rows)
        if name in ("user_id", "item_id"):
            parsed[name] = columns.ids(values, where)
        elif name == "timestamp":
            parsed[name], key = columns.times(values, config.timestamp_unit, where)
        elif name == "position":
            parsed[name] = columns.whole_numbers(values, where, "a position must be a whole number")
            key = parsed[name] if key is None else key
        else:
            parsed[name], actions = columns.categories(values, where)
    assert key is not None
    return EventLog(pa.table(parsed), key, actions, repairs)


def _kept_rows(log: EventLog, config: TableConfig, repairs: dict[str, int]) -> np.ndarray:
    """(n,) bool rows left after the drops that a config asks for; counts them in ``repairs``."""
    user, _ = columns.dense(log.table["user_id"].combine_chunks())
    item, _ = columns.dense(log.table["item_id"].combine_chunks())
    keep = np.ones(user.size, bool)
    if config.duplicates == "drop":
        others = [log.table[n].to_numpy() for n in ("position", "action") if n in log.table.column_names]
        equal = [log.order_key, item, user, *others]
        order = np.lexsort(equal)  # stable, so the first of equal rows comes first
        again = np.ones(user.size - 1, bool)
        for values in equal:
            again &= values[order][1:] == values[order][:-1]
        keep[order[1:][again]] = False
        repairs["duplicate_rows_dropped"] = int((~keep).sum())
    if config.min_item_events > 1 or config.min_user_events > 1:
        before = int(keep.sum())
        rich_item = np.bincount(item[keep], minlength=item.max() + 1) >= config.min_item_events
        rich_user = np.bincount(user[keep], minlength=user.max() + 1) >= config.min_user_events
        keep &= rich_item[item] & rich_user[user]
        keep &= (np.bincount(user[keep], minlength=user.max() + 1) >= config.min_user_events)[user]
        repairs["rare_rows_dropped"] = before - int(keep.sum())
        if not keep.any():
            raise UserError(
                f"{config.path}: no row is left after min_user_events {config.min_user_events} and "
                f"min_item_events {config.min_item_events}; lower them"
            )
    return keep


def _chunks(users: pa.Array, offsets: np.ndarray, flat: dict[str, np.ndarray]) -> Iterator[Chunk]:
    for lo in range(0, len(users), SHARD_USERS):
        part = offsets[lo : lo + SHARD_USERS + 1]
        events = slice(int(part[0]), int(part[-1]))
        yield Chunk(users[lo : lo + SHARD_USERS], part - part[0], {name: v[events] for name, v in flat.items()})


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def _check_file(path: Path) -> str:
    """The file's kind by its suffix.

    Raises:
        UserError: Missing, not a file, empty, or of an unknown suffix.
    """
    suffix = _suffix(path)
    if suffix not in _SEPARATORS and suffix not in _PARQUET:
        raise UserError(
            f"{path} has the suffix {suffix or '(none)'!r}; a log is .csv, .tsv (each also .gz), .parquet or .pq"
        )
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path} does not exist{hint}")
    if not path.is_file():
        raise UserError(f"{path} is not a file; name one CSV or Parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return suffix


def _csv_options(suffix: str, names: tuple[str, ...]) -> tuple[pacsv.ReadOptions, pacsv.ParseOptions]:
    read = pacsv.ReadOptions(column_names=list(names) or None)
    return read, pacsv.ParseOptions(delimiter=_SEPARATORS[suffix])


def _column_names(path: Path, names: tuple[str, ...]) -> list[str]:
    suffix = _check_file(path)
    if names and suffix in _SEPARATORS:
        return list(names)
    try:
        if suffix in _PARQUET:
            return pq.read_schema(path).names
        read, parse = _csv_options(suffix, names)
        with pacsv.open_csv(path, read, parse) as reader:
            return reader.schema.names
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, suffix, error) from None


def _read(path: Path, wanted: tuple[str, ...], names: tuple[str, ...]) -> pa.Table:
    """Some columns of a file; a CSV's as text, with empty fields as nulls."""
    present = _column_names(path, names)
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{path} has no column {column!r}; {hint}its columns are {', '.join(present)}")
        if present.count(column) > 1:
            raise UserError(f"{path} has {present.count(column)} columns {column!r}; rename all but one")
    suffix = _suffix(path)
    distinct = list(dict.fromkeys(wanted))
    try:
        if suffix in _PARQUET:
            return pq.read_table(path, columns=distinct)
        convert = pacsv.ConvertOptions(
            column_types={column: pa.string() for column in distinct},
            include_columns=distinct,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        )
        read, parse = _csv_options(suffix, names)
        return pacsv.read_csv(path, read, parse, convert)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, suffix, error) from None


def _unreadable(path: Path, suffix: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    kind = "Parquet file (truncated or corrupt)" if suffix in _PARQUET else "CSV file"
    return UserError(f"{path} cannot be read as a {kind}: {reason}")
