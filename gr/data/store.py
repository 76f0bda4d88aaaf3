"""A prepared log on disk and in memory: users' events flat and in time order.

::

    folder/
      shard-00000.parquet   one row a user: user_id, item_id list<int64>, timestamp list<int64>, ...
      items.parquet         one row an item, in dense order: item_id (original), title, ...
      manifest.json         counts, content hash, repairs, caveats; written last

The folder is written under another name and renamed, so a folder under its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import UserError

FORMAT = 2
SHARD_USERS = 50_000
NO_TIMES = "no times: only the order of the events is known"
EVENT_COLUMNS = ("item_id", "timestamp", "action")


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
            if the log has no times; ``action`` 0..A-1, absent if it has no actions.
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
        chunks: Users in their final order, ``SHARD_USERS`` or fewer of them at a time to keep memory small.
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
    """Reads a store into memory.

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
        names = manifest["columns"]
        counts = manifest["counts"]
        offsets, user_ids = [np.zeros(1, np.int64)], []
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for shard in manifest["shards"]:
            table = _read_parquet(folder / shard["file"], shard["users"], again)
            for name in names:
                lists = table.column(name).combine_chunks()
                parts[name].append(lists.flatten().to_numpy())
            offsets.append(offsets[-1][-1] + np.cumsum(np.diff(lists.offsets.to_numpy()), dtype=np.int64))
            user_ids += table.column("user_id").chunks
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"prepared data {folder} is incomplete: {' '.join(str(error).split())}{again}") from None
    columns = {}
    for name in names:  # each column's parts are let go once joined, so that no more than one stands twice
        columns[name] = np.concatenate(parts.pop(name) or [np.zeros(0, np.int64)])
    store = EventStore(
        offsets=np.concatenate(offsets),
        columns=columns,
        num_items=items.num_rows,
        num_actions=int(manifest["num_actions"]),
        manifest=manifest,
        user_ids=pa.concat_arrays(user_ids),
        items=items,
        folder=folder,
    )
    ids = store.columns["item_id"]
    if store.num_events != counts["events"] or (ids.size and not 0 <= ids.min() <= ids.max() < store.num_items):
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
    hashes: dict[str, Any] = {}  # one running hash a column, so that the cutting into shards does not matter
    shards, users, events, names = [], 0, 0, None
    for chunk in _cut(chunks):
        names = names or [n for n in EVENT_COLUMNS if n in chunk.columns]
        assert set(names) == set(chunk.columns) and "item_id" in names, f"columns {sorted(chunk.columns)}"
        assert len(chunk.user_ids) == chunk.offsets.size - 1 and chunk.offsets[0] == 0
        columns: dict[str, pa.Array] = {"user_id": chunk.user_ids}
        offsets = pa.array(chunk.offsets, pa.int32())
        for name in names:
            values = np.ascontiguousarray(chunk.columns[name], np.int64)
            assert values.size == chunk.offsets[-1], f"column {name}"
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values))
            hashes.setdefault(name, hashlib.sha256()).update(values.tobytes())
        hashes.setdefault("lengths", hashlib.sha256()).update(np.diff(chunk.offsets).astype(np.int64).tobytes())
        hashes.setdefault("user_id", hashlib.sha256()).update(
            "\n".join(map(str, chunk.user_ids.to_pylist())).encode() + b"\n"
        )
        file = f"shard-{len(shards):05d}.parquet"
        _write_parquet(pa.table(columns), staging / file)
        shards.append({"file": file, "users": len(chunk.user_ids)})
        users, events = users + len(chunk.user_ids), events + int(chunk.offsets[-1])
    assert names is not None, "a store needs users"
    _write_parquet(items, staging / "items.parquet")
    hashes["items"] = hashlib.sha256(json.dumps(items.to_pydict(), default=str, ensure_ascii=False).encode())
    digest = hashlib.sha256(json.dumps([(k, hashes[k].hexdigest()) for k in sorted(hashes)]).encode()).hexdigest()
    caveats = list(manifest.get("caveats", []))
    if "timestamp" not in names and NO_TIMES not in caveats:
        caveats.append(NO_TIMES)
    return {
        "source": "",
        "repairs": {},
        "num_actions": 0,
        **manifest,
        "format": FORMAT,
        "caveats": caveats,
        "counts": {**manifest.get("counts", {}), "users": users, "items": items.num_rows, "events": events},
        "has_times": "timestamp" in names,
        "columns": names,
        "shards": shards,
        "content_hash": digest,
    }


def _cut(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same users ``SHARD_USERS`` at a time, whatever the size of the chunks."""
    waiting: list[Chunk] = []
    count = 0
    for chunk in chunks:
        lo = 0
        while lo < len(chunk.user_ids):
            part = _slice(chunk, lo, lo + SHARD_USERS - count)
            waiting.append(part)
            lo, count = lo + len(part.user_ids), count + len(part.user_ids)
            if count == SHARD_USERS:
                yield _join(waiting)
                waiting, count = [], 0
    if waiting:
        yield _join(waiting)


def _slice(chunk: Chunk, lo: int, hi: int) -> Chunk:
    offsets = np.asarray(chunk.offsets[lo : hi + 1], np.int64)
    events = slice(int(offsets[0]), int(offsets[-1]))
    columns = {name: values[events] for name, values in chunk.columns.items()}
    return Chunk(chunk.user_ids[lo:hi], offsets - offsets[0], columns)


def _join(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
    return Chunk(
        pa.concat_arrays([chunk.user_ids for chunk in chunks]),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        {name: np.concatenate([chunk.columns[name] for chunk in chunks]) for name in chunks[0].columns},
    )


def _write_parquet(table: pa.Table, path: Path) -> None:
    # Page checksums turn silent bit rot into an error when read.
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


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
