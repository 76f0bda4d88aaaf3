"""A user's own CSV or Parquet files, prepared into a store."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from gr.data import table_files
from gr.data.out_of_core import prepare_log
from gr.data.raw import ItemTable, RawLog, Rules
from gr.data.table_files import Encoding, Format
from gr.errors import UserError


@dataclass(frozen=True)
class ItemTableConfig:
    """A table with one row an item.

    Attributes:
        path: CSV or Parquet.
        id: Its column of item ids, as in the log.
        title: Its column of titles.
        columns: Further columns to keep.
        candidates: ``log``: only items of the log can be recommended; ``all``: every item of this table too.
        delimiter: As the log's.
        encoding: As the log's.
    """

    path: str
    id: str = "item_id"
    title: str = "title"
    columns: tuple[str, ...] = ()
    candidates: Literal["log", "all"] = "log"
    delimiter: str | None = None
    encoding: Encoding = "utf-8"

    def __post_init__(self) -> None:
        _check_delimiter(self.delimiter)


@dataclass(frozen=True)
class TableConfig(Rules):
    """A log of events, one row an event; ``Rules`` says what is kept of it.

    Attributes:
        path: ``.csv``, ``.tsv`` (each also ``.gz``), ``.parquet`` or ``.pq``; a folder of Parquet files; or a
            pattern such as ``events/*.parquet``. Several files are read in the order of their names.
        user: Column of user ids, integers or text.
        item: Column of item ids, integers or text.
        timestamp: Column of times; ``None``: ``timestamp`` if the file has it.
        position: Column of places in the user's order; breaks ties in time, or stands alone when the file has
            no times. ``None``: ``position`` if the file has it and there is no time column.
        action: Column of actions or ratings; each distinct value becomes one action.
        names: Column names of a CSV without a header line.
        delimiter: One character between the columns of a CSV; ``None``: a comma, in a ``.tsv`` a tab.
        encoding: Of a CSV.
        items: Table of titles.
    """

    path: str
    kind: str = "table"
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = None
    position: str | None = None
    action: str | None = None
    names: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: Encoding = "utf-8"
    items: ItemTableConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_delimiter(self.delimiter)


class Table:
    """The source of ``kind: table``."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self._form = Format(config.names, config.delimiter, config.encoding)

    def fingerprint(self) -> str:
        """sha256 over the files' contents, so that a changed file is prepared anew and a moved one is not."""
        digest = hashlib.sha256()
        paths = table_files.list_files(self.config.path, self._form)
        if self.config.items:
            paths.append(Path(self.config.items.path))
            table_files.check_file(paths[-1], _item_format(self.config.items))
        for path in paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def prepare(self, folder: str | Path) -> None:
        """Writes the store of this log into ``folder``.

        Raises:
            UserError: The file or a column is missing or wrong, or no user has 2 events.
        """
        prepare_log(read_log(self.config), self.config, folder)


def read_log(config: TableConfig) -> RawLog:
    """The columns that a config names, unparsed.

    Raises:
        UserError: A file or column is missing; while its batches are read, also that a file is broken.
    """
    form = Format(config.names, config.delimiter, config.encoding)
    paths = table_files.list_files(config.path, form)
    names = _named(config, paths[0], table_files.column_names(paths[0], form))
    starts: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:
        rows = 0
        for path in paths:
            starts.append(rows)
            for batch in table_files.read(path, tuple(names.values()), form):
                rows += batch.num_rows
                yield pa.RecordBatch.from_arrays([batch[column] for column in names.values()], list(names))

    def locate(row: int) -> tuple[str, int]:
        place = bisect.bisect_left(starts, row) - 1
        return str(paths[place]), row - starts[place]

    items = None if config.items is None else read_items(config.items)
    return RawLog(config.path, names, batches(), items, locate if len(paths) > 1 else None)


def _named(config: TableConfig, path: Path, present: list[str]) -> dict[str, str]:
    """Canonical name to column for what a config names and what is there."""
    timestamp = config.timestamp or ("timestamp" if "timestamp" in present else None)
    position = config.position or ("position" if timestamp is None and "position" in present else None)
    if timestamp is None and position is None and len(present) > 1:
        raise UserError(
            f"{path}: the log has neither times nor positions (its columns are {', '.join(present)}); times "
            "are never invented: name a `position` column in data.position or a `timestamp` column in "
            "data.timestamp"
        )
    named = {"user_id": config.user, "item_id": config.item, "timestamp": timestamp, "position": position}
    return {name: column for name, column in (named | {"action": config.action}).items() if column}


def read_items(config: ItemTableConfig) -> ItemTable:
    """The titles that a config names, unparsed.

    Raises:
        UserError: The file or a column is missing, or the file is broken.
    """
    path, form = Path(config.path), _item_format(config)
    wanted = (config.id, config.title, *config.columns)
    source = pa.Table.from_batches(
        list(table_files.read(path, wanted, form))
        or [pa.record_batch({column: pa.array([], pa.string()) for column in wanted})]
    )
    columns = {"item_id": source[config.id], "title": source[config.title]}
    columns |= {name: source[name] for name in config.columns}
    return ItemTable(config.path, config.id, pa.table(columns), config.candidates)


def _item_format(config: ItemTableConfig) -> Format:
    return Format(delimiter=config.delimiter, encoding=config.encoding)


def _check_delimiter(delimiter: str | None) -> None:
    if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n'):
        raise UserError(f"delimiter is {delimiter!r}; it must be one ASCII character, such as ';' or a tab (\"\\t\")")
