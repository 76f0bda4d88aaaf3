"""A prepared log on disk and in memory: users' events flat and in time order.

::

    folder/
      item_id.npy, ...   one file a column: (E,) int64, the users one after another
      users.parquet      one row a user: user_id (original), events (how many)
      items.parquet      one row an item, in dense order: item_id (original), title, ...
      manifest.json      counts, checksums, content hash, repairs, caveats; written last

The columns are mapped, not read: what is not looked at costs no memory, and what was lies in the page cache, which
the system takes back when it needs it and all processes of a machine share. So a log may be larger than memory, and a
rank reads the events of its own users. In memory stand 8 bytes a user and its original id.

The folder is written under another name and renamed, so a folder under its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import UserError

FORMAT = 3
NO_TIMES = "no times: only the order of the events is known"
EVENT_COLUMNS = ("item_id", "timestamp", "action")
_READ_BYTES = 1 << 20
# Page checksums turn silent bit rot into an error when read.
PARQUET = {"compression": "zstd", "write_page_checksum": True}


@dataclass(frozen=True)
class Chunk:
    """Some users with all of their events, in the order in which they are to be stored.

    Attributes:
        user_ids: (n,) original ids, string or int64.
        offsets: (n+1,) int64, starts of the users in ``columns``; ``offsets[0] == 0``.
        columns: (events,) int64: ``item_id`` (dense), optional ``timestamp`` (s) and ``action`` (dense).
    """

    user_ids: pa.Array
    offsets: np.ndarray
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class EventStore:
    """A prepared log.

    Attributes:
        offsets: (U+1,) int64, starts of the users in ``columns``.
        columns: (E,) int64: ``item_id`` 0..V-1; ``timestamp`` seconds, non-decreasing within a user, absent
            if the log has no times; ``action`` 0..A-1, absent if it has no actions. Of a store on disk they are mapped
            and cannot be written to.
        num_items: V.
        num_actions: A, 0 without actions.
        manifest: ``counts``, ``content_hash``, ``caveats`` (list of sentences), ``repairs`` (name -> count),
            ``source``.
        user_ids: (U,) original ids, string or int64.
        items: V rows: ``item_id`` (original), ``title`` (the id as text where unknown), optional further
            columns.
        folder: Where it was read from; ``None`` for a store made in memory.
    """

    offsets: np.ndarray
    columns: dict[str, np.ndarray]
    num_items: int
    num_actions: int
    manifest: dict[str, Any]
    user_ids: pa.Array
    items: pa.Table
    folder: Path | None = None

    @property
    def num_users(self) -> int:
        """U."""
        return self.offsets.size - 1

    @property
    def num_events(self) -> int:
        """E."""
        return int(self.offsets[-1])

    @property
    def has_times(self) -> bool:
        """Whether the log has real times; without them only the order is known."""
        return "timestamp" in self.columns

    @property
    def lengths(self) -> np.ndarray:
        """(U,) int64 events of each user."""
        return np.diff(self.offsets)

    def require_times(self, what: str) -> None:
        """Raises UserError when ``what`` needs times and the log has none."""
        if not self.has_times:
            raise UserError(
                f"{what} needs times, and the log {self.manifest.get('source', '')} gives only the order of "
                "events; name its timestamp column, or choose a part that reads order alone"
            )


def write_store(folder: str | Path, chunks: Iterable[Chunk], items: pa.Table, manifest: dict[str, Any]) -> Path:
    """Writes a store; nothing is left under ``folder`` unless all of it was written.

    Args:
        folder: Final name; its parent is made if missing. An existing store there is replaced.
        chunks: Users in their final order, some thousands at a time: each chunk is a row group of ``users.parquet``.
        items: V rows in dense order with ``item_id`` and ``title``.
        manifest: ``source`` (text) and, optionally, ``caveats``, ``repairs``, ``num_actions``, and whatever
            else the source wants to keep. Counts and hash are added here.

    Returns:
        The folder.

    Raises:
        UserError: The disk is full or the place cannot be written.
    """
    folder = Path(folder)
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        full = _write_into(staging, chunks, items, manifest)
        (staging / "manifest.json").write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(staging, folder)
    except OSError as error:
        raise UserError(f"the prepared data {folder} could not be written: {error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def read_store(folder: str | Path) -> EventStore:
    """Opens a store. Every byte is read once, to be compared with its checksum, but only users and items are kept.

    Raises:
        UserError: The folder is missing, incomplete, truncated, corrupt or of another format.
    """
    folder = Path(folder)
    again = f"; delete {folder} and the same command prepares it again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(
                f"prepared data {folder} has format {manifest['format']}, this version reads {FORMAT}{again}"
            )
        items = _read_parquet(folder / "items.parquet", manifest["counts"]["items"], again)
        counts = manifest["counts"]
        users = _read_parquet(folder / "users.parquet", counts["users"], again)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(users["events"].to_numpy(), dtype=np.int64)])
        columns = {}
        for name, checksum in manifest["columns"].items():
            columns[name] = _mapped(folder / f"{name}.npy", counts["events"], checksum, again)
        store = EventStore(
            offsets=offsets,
            columns=columns,
            num_items=items.num_rows,
            num_actions=int(manifest["num_actions"]),
            manifest=manifest,
            user_ids=users["user_id"].combine_chunks(),
            items=items,
            folder=folder,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"prepared data {folder} is incomplete: {' '.join(str(error).split())}{again}") from None
    if store.num_events != counts["events"] or "item_id" not in columns:
        raise UserError(f"prepared data {folder} does not agree with its manifest{again}")
    return store


def memory_store(
    sequences: Iterable[np.ndarray] | tuple[np.ndarray, ...],
    timestamps: Iterable[np.ndarray] | None = None,
    actions: Iterable[np.ndarray] | None = None,
    num_items: int | None = None,
    source: str = "memory",
) -> EventStore:
    """A store from per-user arrays of dense ids, for tests, notebooks and sources that need no disk.

    Args:
        sequences: U arrays of dense item ids in time order.
        timestamps: U arrays of seconds, or ``None``.
        actions: U arrays of dense actions, or ``None``.
        num_items: V; defaults to the largest id plus one.
        source: What the manifest calls it.
    """
    rows = [np.asarray(row, np.int64) for row in sequences]

    def flat(values: Iterable[np.ndarray] | None) -> np.ndarray:
        return np.concatenate([np.asarray(v, np.int64) for v in values] or [np.zeros(0, np.int64)])

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([row.size for row in rows], dtype=np.int64)])
    columns = {"item_id": flat(rows)}
    if timestamps is not None:
        columns["timestamp"] = flat(timestamps)
    if actions is not None:
        columns["action"] = flat(actions)
    assert all(c.size == offsets[-1] for c in columns.values()), "columns of different lengths"
    v = int(columns["item_id"].max(initial=-1)) + 1 if num_items is None else num_items
    named = min(v, 1_000_000)  # a test may claim 2**40 items; nobody names those
    ids = pa.array(np.arange(named))
    return EventStore(
        offsets=offsets,
        columns=columns,
        num_items=v,
        num_actions=int(columns["action"].max(initial=-1)) + 1 if actions is not None else 0,
        manifest={"source": source, "caveats": [] if timestamps is not None else [NO_TIMES], "repairs": {}},
        user_ids=pa.array(np.arange(len(rows))),
        items=pa.table({"item_id": ids, "title": ids.cast(pa.string())}),
    )


def _write_into(staging: Path, chunks: Iterable[Chunk], items: pa.Table, manifest: dict[str, Any]) -> dict[str, Any]:
    hashes: dict[str, Any] = {}  # one running hash a column, so that the cutting into chunks does not matter
    columns: dict[str, _Column] = {}
    users, events = 0, 0
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for chunk in chunks:
            lengths = np.diff(chunk.offsets)
            rows = pa.table({"user_id": chunk.user_ids, "events": pa.array(lengths, pa.int64())})
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(staging / "users.parquet", rows.schema, **PARQUET))
                for name in (n for n in EVENT_COLUMNS if n in chunk.columns):
                    columns[name] = stack.enter_context(_Column(staging / f"{name}.npy"))
            assert set(columns) == set(chunk.columns) and "item_id" in columns, f"columns {sorted(chunk.columns)}"
            assert len(chunk.user_ids) == lengths.size and chunk.offsets[0] == 0
            writer.write_table(rows)
            for name, column in columns.items():
                values = np.ascontiguousarray(chunk.columns[name], np.int64)
                assert values.size == chunk.offsets[-1], f"column {name}"
                column.write(values)
                hashes.setdefault(name, hashlib.sha256()).update(values)
            ids = chunk.columns["item_id"]
            assert not ids.size or 0 <= ids.min() <= ids.max() < items.num_rows, "item_id outside the items"
            hashes.setdefault("lengths", hashlib.sha256()).update(lengths.astype(np.int64).tobytes())
            hashes.setdefault("user_id", hashlib.sha256()).update(
                "\n".join(map(str, chunk.user_ids.to_pylist())).encode() + b"\n"
            )
            users, events = users + lengths.size, events + int(chunk.offsets[-1])
        assert writer is not None, "a store needs users"
    pq.write_table(items, staging / "items.parquet", **PARQUET)
    hashes["items"] = hashlib.sha256(json.dumps(items.to_pydict(), default=str, ensure_ascii=False).encode())
    digest = hashlib.sha256(json.dumps([(k, hashes[k].hexdigest()) for k in sorted(hashes)]).encode()).hexdigest()
    caveats = list(manifest.get("caveats", []))
    if "timestamp" not in columns and NO_TIMES not in caveats:
        caveats.append(NO_TIMES)
    return {
        "source": "",
        "repairs": {},
        "num_actions": 0,
        **manifest,
        "format": FORMAT,
        "caveats": caveats,
        "counts": {**manifest.get("counts", {}), "users": users, "items": items.num_rows, "events": events},
        "has_times": "timestamp" in columns,
        "columns": {name: column.checksum for name, column in columns.items()},
        "content_hash": digest,
    }


class _Column:
    """A ``.npy`` file of int64 that grows; numpy leaves room in its header for the length.

    Attributes:
        checksum: CRC-32 of the numbers written so far, as little-endian bytes.
    """

    def __init__(self, path: Path) -> None:
        self.file, self.size, self.checksum = path.open("wb"), 0, 0

    def __enter__(self) -> _Column:
        self._header()
        return self

    def __exit__(self, *_: object) -> None:
        with self.file:
            self.file.seek(0)
            self._header()

    def write(self, values: np.ndarray) -> None:
        """Appends int64 numbers."""
        data = memoryview(values.astype("<i8", copy=False)).cast("B") if values.size else b""
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += values.size

    def _header(self) -> None:
        shape = {"descr": "<i8", "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self.file, shape)


def _mapped(path: Path, size: int, checksum: int, again: str) -> np.ndarray:
    """(size,) int64 column, mapped, after a look at all of it."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            begin, found = file.tell(), 0
            while data := file.read(_READ_BYTES):
                found = zlib.crc32(data, found)
            whole = (shape, dtype, file.tell(), found) == ((size,), np.dtype("<i8"), begin + 8 * size, checksum)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f"prepared data lacks {path}{again}") from None
    except (OSError, ValueError):  # the latter where the header is none
        whole = False
    if not whole:
        raise UserError(f"prepared data file {path} is truncated or corrupt{again}")
    return np.frombuffer(mapped, "<i8", offset=begin)


def _read_parquet(path: Path, rows: int, again: str) -> pa.Table:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(f"prepared data lacks {path}{again}") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"prepared data file {path} is truncated or corrupt ({reason}){again}") from None
    if table.num_rows != rows:
        raise UserError(f"prepared data file {path} has {table.num_rows} rows, its manifest says {rows}{again}")
    return table
