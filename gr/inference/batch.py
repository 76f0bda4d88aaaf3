"""Recommendations for many users into one Parquet file, a block of users at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gr.data.layout import history_batch
from gr.errors import UserError
from gr.files import replacing
from gr.inference.load import Loaded
from gr.inference.recommend import Past, hidden_items, user_past

USERS = 256  # encoded at a time
SCORES = 2**25  # most scores of them at a time: 128 MiB in float32, and as much again for what is masked
ROW_GROUP = 8192  # users of a row group


def find_users(loaded: Loaded, wanted: str) -> np.ndarray:
    """(n,) int64 user indices in the order asked for.

    Args:
        loaded: The run.
        wanted: ``all``; a file with one original id a line; or ids with commas between them.

    Raises:
        UserError: Ids that the log lacks, a file that cannot be read, or no id at all.
    """
    ids = loaded.store.user_ids
    if wanted == "all":
        return np.arange(len(ids))
    if Path(wanted).is_file():
        try:
            words = Path(wanted).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"users file {wanted} cannot be read as text: {error}") from None
    elif Path(wanted).suffix in (".txt", ".csv"):
        raise UserError(f"users file {wanted} does not exist; give a file with one id a line, ids, or all")
    else:
        words = wanted.split(",")
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise UserError(f"--users {wanted!r} names no user; give all, a file with one id a line, or ids with commas")
    found = pc.index_in(pa.array(words, pa.string()), value_set=_texts(ids))
    unknown = found.null_count
    if unknown:
        first = words[pc.index(found.is_null(), True).as_py()]
        raise UserError(f"{unknown:,} of {len(words):,} users are not in the log, the first is {first!r}")
    return found.to_numpy().astype(np.int64)


def recommend_all(
    loaded: Loaded,
    users: np.ndarray,
    out: str | Path,
    *,
    k: int = 10,
    at: int | None = None,
    include_seen: bool | None = None,
    titles: bool = False,
    whole: bool = False,
) -> int:
    """Writes what ``recommend`` would show each user; one row a user, in the order given.

    Columns: ``user_id`` and ``items`` (list, best first) with the ids' original types, ``scores`` (list of float32)
    and, if asked, ``titles`` (list). The file appears whole or not at all; memory does not grow with the users.

    Args:
        loaded: From ``load_run``.
        users: (n,) int64 user indices.
        out: The Parquet file.
        k: Items a user, fewer where fewer may be shown.
        at: As in ``recommend``; a user without an earlier event gets empty lists.
        include_seen: As in ``recommend``.
        titles: Whether titles are written.
        whole: As in ``recommend``.

    Returns:
        How many users got no list because they had no event before ``at``.

    Raises:
        UserError: The file cannot be written.
    """
    out, empty = Path(out), 0
    writer, waiting, rows = None, [], 0
    try:
        with replacing(out) as aside, contextlib.ExitStack() as stack:
            for table, none in _tables(loaded, users, k, at, include_seen, titles, whole):
                empty += none
                writer = writer or stack.enter_context(pq.ParquetWriter(aside, table.schema))
                waiting.append(table)
                rows += len(table)
                if rows >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting, rows = [], 0
            assert writer is not None, "find_users gives at least one"
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    return empty


def _tables(
    loaded: Loaded, users: np.ndarray, k: int, at: int | None, include_seen: bool | None, titles: bool, whole: bool
) -> Iterator[tuple[pa.Table, int]]:
    """(rows of some users, how many of them have no history)."""
    store = loaded.store
    size = max(1, min(USERS, SCORES // store.num_items))
    for lo in range(0, len(users), size):
        block = users[lo : lo + size]
        pasts = [None if at is not None and not _begins_before(loaded, u, at) else user_past(loaded, u, at, whole)
                 for u in block.tolist()]  # fmt: skip
        items, scores, counts = _ask(loaded, [past for past in pasts if past is not None], k, include_seen)
        lengths = np.zeros(len(block), np.int64)
        lengths[[past is not None for past in pasts]] = counts
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())

        def lists(values: pa.Array | pa.ChunkedArray, offsets: pa.Array = offsets) -> pa.Array:
            whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
            return pa.ListArray.from_arrays(offsets, whole)

        columns = {
            "user_id": store.user_ids.take(pa.array(block)),
            "items": lists(store.items["item_id"].take(pa.array(items))),
            "scores": lists(pa.array(scores, pa.float32())),
        }
        if titles:
            names = pc.coalesce(store.items["title"], _texts(store.items["item_id"]))
            columns["titles"] = lists(names.take(pa.array(items)))
        yield pa.table(columns), sum(past is None for past in pasts)


def _ask(
    loaded: Loaded, pasts: Sequence[Past], k: int, include_seen: bool | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items and scores of all pasts, one after the other, and the (B,) number of each."""
    if not pasts:
        return np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
    first = pasts[0]
    batch = history_batch(
        [past.items for past in pasts],
        None if first.timestamps is None else [past.timestamps for past in pasts],
        None if first.actions is None else [past.actions for past in pasts],
        None if first.timestamps is None else [past.query_time for past in pasts],
        loaded.layout,
    ).to(loaded.device)
    barred = torch.zeros(len(pasts), loaded.store.num_items, dtype=torch.bool)
    for row, past in zip(barred.numpy(), pasts, strict=True):
        row[hidden_items(loaded, past.items, include_seen)] = True
    with torch.no_grad():
        ranked = loaded.model.recommend(batch, k, barred.to(loaded.device))
    if bool(ranked.scores.isnan().any()):
        raise UserError("the model's scores are not numbers; its training diverged, train again with a smaller lr")
    shown = ranked.items >= 0
    return (
        ranked.items[shown].cpu().numpy(),
        ranked.scores[shown].float().cpu().numpy(),
        shown.sum(1).cpu().numpy(),
    )


def _begins_before(loaded: Loaded, user: int, at: int) -> bool:
    return int(loaded.store.columns["timestamp"][loaded.store.offsets[user]]) < at


def _texts(ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return ids.cast(pa.string())
