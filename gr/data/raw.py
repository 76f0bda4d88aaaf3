"""What every source of a log hands to the one preparation: unparsed columns in batches, and the rules to apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from gr.data.columns import TimeUnit
from gr.errors import UserError


@dataclass(frozen=True)
class ItemTable:
    """Titles of items, as a source hands them over.

    Attributes:
        path: File name, for errors.
        id: The file's own name of its id column, for errors.
        table: ``item_id`` (unparsed), ``title`` and further columns.
        candidates: ``log``: only items of the log can be recommended; ``all``: every item of this table too.
    """

    path: str
    id: str
    table: pa.Table
    candidates: Literal["log", "all"] = "log"


@dataclass(frozen=True)
class RawLog:
    """A log as a source hands it over.

    Attributes:
        source: File, for errors; its last part is the manifest's ``source``.
        names: Canonical name (``user_id``, ``item_id``, ``timestamp``, ``position``, ``action``) to the file's
            own column name, for errors. At least one of ``timestamp`` and ``position`` is among them.
        batches: Canonical columns only; a CSV's values as text, Parquet's typed; nulls allowed; read once.
        items: Titles, if the source has them.
        locate: Row of the whole log, the first being 1, to the file it is from and its row there, for errors;
            ``None``: all rows are from ``source``.
        extra: Further entries of the manifest.
    """

    source: str
    names: dict[str, str]
    batches: Iterator[pa.RecordBatch | pa.Table]
    items: ItemTable | None = None
    locate: Callable[[int], tuple[str, int]] | None = None
    extra: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What every source of a log lets its user choose.

    Attributes:
        timestamp_unit: Unit of numeric times.
        duplicates: ``drop`` keeps the first of rows equal in all columns that are read, ``keep`` keeps all.
        ties: Order of a user's events of one time (and position): as in the ``file``, or ``shuffled`` (the same way
            each time). Many files list events of one second or day in an order of their own, such as by item, which a
            model can learn and which tells nothing of its users.
        core: How the two minima are applied. ``once``: items and users are counted once on the whole log
            after duplicates, then users again, as arXiv 2402.17152's code does with 5 and 5. ``iterated``:
            both again and again until nothing more goes (the k-core).
        min_user_events: Users with fewer events are dropped.
        min_item_events: Items with fewer events are dropped.
        caveats: Sentences printed beside every number made from this log.
    """

    timestamp_unit: TimeUnit = "s"
    duplicates: Literal["keep", "drop"] = "drop"
    ties: Literal["file", "shuffled"] = "file"
    core: Literal["once", "iterated"] = "once"
    min_user_events: int = 1
    min_item_events: int = 1
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("min_user_events", "min_item_events"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
