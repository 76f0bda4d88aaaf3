"""Prepares a log of any size: parsed batch by batch, cut by user into buckets, sorted a bucket at a time.

Memory goes with one bucket, the distinct ids and one bit a row; a log of at most ``bucket_rows`` rows makes
one bucket and no temporary file, by the same path.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data import columns
from gr.data.buckets import Bucket, Counts, cut_by_user, drop_duplicates, drop_rare, mixed
from gr.data.columns import Where
from gr.data.parse import ParsedLog, parse_log
from gr.data.raw import ItemTable, RawLog, Rules
from gr.data.spill import Scratch
from gr.data.store import Chunk, write_store
from gr.data.tie_order import USERS, TieOrder
from gr.errors import UserError

BUCKET_ROWS = 1 << 22
"""Some 0.4 GiB while a bucket is sorted."""


def prepare_log(raw: RawLog, rules: Rules, folder: str | Path, *, bucket_rows: int = BUCKET_ROWS) -> None:
    """Writes the store of a log.

    Users stand in the order of their ids, their events by time, then position, then row of the input. Items
    are numbered in the order of their ids.

    Args:
        raw: The log; its batches are used up.
        rules: What to drop, and the unit of times.
        folder: The store's; temporary files stand beside it while they are needed.
        bucket_rows: Rows to hold in memory at a time, but for a single user with more. The result does not
            depend on it.

    Raises:
        UserError: A column or value is wrong, nothing is left to learn from, or the disk is full.
    """
    with Scratch(Path(folder)) as scratch:
        known = None if raw.items is None else _known_items(raw.items)
        log = parse_log(raw, rules, scratch, bucket_rows)
        users, events = log.users.sorted()
        items, _ = log.items.sorted()
        if known is not None and known.type != items.type:
            # One file says 7, the other also says "7a": both are text then, and sorted as text.
            known, items = known.cast(pa.string()), items.cast(pa.string())
            items = items.take(pc.sort_indices(items))
        codes, actions = log.actions.finish() if log.actions else (np.zeros(0, np.int64), [])
        buckets = cut_by_user(log, users, events.to_numpy(), items, codes, scratch, bucket_rows)
        repairs: dict[str, int] = {"null_rows_dropped": log.null_rows}
        counts = _drop(buckets, len(users), len(items), raw, rules, repairs)
        ids = items.filter(pa.array(counts.item > 0))
        table = _item_table(raw.items, known, ids, repairs)
        dense = pc.index_in(items, value_set=table["item_id"].combine_chunks()).fill_null(-1).to_numpy()
        repairs |= {
            "out_of_order_rows_sorted": 0,
            "one_event_users_not_evaluated": int((counts.user == 1).sum()),
        }
        counted = {"rows_read": log.rows_read}
        if raw.items is not None and raw.items.candidates == "all":
            counted["items_without_events"] = table.num_rows - len(ids)
        manifest = {
            "source": Path(raw.source).name,
            "ties": rules.ties,
            "caveats": list(rules.caveats),
            "repairs": repairs,
            "num_actions": len(actions),
            "actions": actions,
            "counts": counted,
            **raw.extra,
        }
        # The manifest is written after the last chunk, so that what chunks count while they are made is in it.
        write_store(folder, _chunks(buckets, users, counts, dense, log, manifest), table, manifest)


def _drop(
    buckets: list[Bucket], num_users: int, num_items: int, raw: RawLog, rules: Rules, repairs: dict[str, int]
) -> Counts:
    """Applies the rules; returns what is left, counted."""
    if rules.duplicates == "drop":
        counts = Counts(np.zeros(num_users, np.int64), np.zeros(num_items, np.int64))
        repairs["duplicate_rows_dropped"] = drop_duplicates(buckets, counts)
    else:
        counts = Counts.of(buckets, num_users, num_items)
    if rules.min_user_events > 1 or rules.min_item_events > 1:
        before = int(counts.user.sum())
        counts = drop_rare(buckets, counts, rules)
        repairs["rare_rows_dropped"] = before - int(counts.user.sum())
        if not counts.user.any():
            raise UserError(
                f"{raw.source}: no row is left after min_user_events {rules.min_user_events} and "
                f"min_item_events {rules.min_item_events}; lower them"
            )
    if not (counts.user >= 2).any():
        raise UserError(f"{raw.source}: no user has 2 events, so there is nothing to learn from or to test with")
    return counts


def _known_items(items: ItemTable) -> pa.Array:
    """The ids of an item table, parsed."""
    known = items.table["item_id"].combine_chunks()
    if known.null_count:
        raise UserError(f"{items.path}: column {items.id!r} has an empty id in {known.null_count} rows")
    if not len(known):
        raise UserError(f"{items.path} has no rows of data")
    known = columns.ids(known, Where(items.path, items.id, np.arange(1, len(known) + 1)))
    repeated = len(known) - len(known.unique())
    if repeated:
        raise UserError(f"{items.path}: column {items.id!r} names {repeated} items twice; one row an item is right")
    return known


def _item_table(items: ItemTable | None, known: pa.Array | None, ids: pa.Array, repairs: dict[str, int]) -> pa.Table:
    """The store's items: those of the log (``ids``), and all of the item table's where it says so."""
    if items is None or known is None:
        return pa.table({"item_id": ids, "title": ids.cast(pa.string())})
    every = ids
    if items.candidates == "all":
        every = pa.concat_arrays([ids, known]).unique()
        every = every.take(pc.sort_indices(every))
    untitled = pc.index_in(ids, value_set=known).null_count
    if untitled == len(ids):
        raise UserError(
            f"{items.path}: none of the log's items stands in column {items.id!r} "
            f"(the log has {ids[0].as_py()!r}, this table {known[0].as_py()!r})"
        )
    repairs["items_missing_in_item_table"] = untitled
    row = pc.index_in(every, value_set=known)
    further = [name for name in items.table.column_names if name not in ("item_id", "title")]
    title = items.table["title"].combine_chunks().cast(pa.string()).take(row)
    table = {"item_id": every, "title": pc.coalesce(title, every.cast(pa.string()))}
    return pa.table(table | {name: items.table[name].combine_chunks().take(row) for name in further})


def _chunks(
    buckets: list[Bucket],
    users: pa.Array,
    counts: Counts,
    dense: np.ndarray,
    log: ParsedLog,
    manifest: dict[str, Any],
) -> Iterator[Chunk]:
    """Sorts bucket after bucket; counts out-of-order rows in the manifest's ``repairs``, and adds a caveat when the
    order within ties is one that users share.

    Args:
        buckets: In the order of their users.
        users: (U,) ids.
        counts: Events left; users without any are left out.
        dense: (V,) final number of each item of the log.
        log: Knows the unit of the times.
        manifest: To count in; its ``ties`` says whether events of one time lose the order of the file.
    """
    repairs, shuffled = manifest["repairs"], manifest["ties"] == "shuffled"
    tie_order = TieOrder(dense.size)
    for bucket in buckets:
        first, end = bucket.users
        lengths = counts.user[first:end]
        if not lengths.any():
            bucket.rows.remove()
            continue
        found = bucket.load()
        bucket.rows.remove()
        keys = [found[name] for name in ("position", "time") if name in found]  # the last is what rows go by
        by_user = np.argsort(found["user"], kind="stable")
        same = np.diff(found["user"][by_user].astype(np.int32)) == 0
        repairs["out_of_order_rows_sorted"] += int((same & (np.diff(keys[-1][by_user]) < 0)).sum())
        if shuffled:
            # From what a row holds, so that neither the cut into buckets nor the order of the file matters.
            keys.insert(0, mixed([found["user"] + np.int64(first), *(found[n] for n in found if n != "user")]))
        # Stable: rows that tie keep the order of the input, which decides what a split holds out.
        order = np.lexsort([*keys, found["user"]])
        flat = {"item_id": dense[found["item"][order]].astype(np.int64)}
        if "time" in found:
            flat["timestamp"] = log.times.seconds(found["time"][order])
        if "action" in found:
            flat["action"] = found["action"][order].astype(np.int64)
        if first < USERS:  # the others are not looked at
            moment = found["time" if "time" in found else "position"]
            tie_order.add(found["user"][order].astype(np.int64) + first, moment[order], found["item"][order])
        left = lengths > 0
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[left])])
        yield Chunk(users.slice(first, end - first).filter(pa.array(left)), offsets, flat)
    caveat = tie_order.caveat()
    manifest["caveats"] += [caveat] if caveat else []
