"""From a user's events to tokens: what the encoder reads and where a label stands.

::

    events            e0  e1  e2  e3          (item, time, action)
    items             i0  i1  i2              labels i1 i2 i3
    added             i0+a0  i1+a1  i2+a2     labels i1 i2 i3     (the preprocessor adds the two vectors)
    interleaved       i0 a0  i1 a1  i2 a2     labels  - i1  - i2  - i3

A label stands at the token that has seen its event's whole past: the item token, or the action token when
items and actions alternate. ``query_time`` of that token is the time of the event to be predicted (arXiv
2402.17152's code: row i of the time bias reads t_{i+1}); an interleaved item token is asked for its own
action, at its own time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gr.data.batch import JaggedBatch, Labels
from gr.data.split import Split, Targets
from gr.data.store import EventStore
from gr.errors import UserError

NARROW_TIMES = 2**31 - 1
"""Times of 32 bits lie in [0, NARROW_TIMES): no distance of two needs more (gr.kernels.hstu_attention)."""


@dataclass(frozen=True)
class LayoutConfig:
    """How events become tokens.

    Attributes:
        kind: ``items``, ``interleaved`` (2 tokens an event) or ``added``.
        max_events: Most recent events that are read; older ones are cut off.
    """

    kind: Literal["items", "interleaved", "added"] = "items"
    max_events: int = 50

    def __post_init__(self) -> None:
        if self.max_events < 1:
            raise UserError(f"max_events is {self.max_events}; it must be at least 1")

    @property
    def tokens_per_event(self) -> int:
        """2 when items and actions alternate, else 1."""
        return 2 if self.kind == "interleaved" else 1

    @property
    def max_tokens(self) -> int:
        """Longest row that this layout writes."""
        return self.max_events * self.tokens_per_event

    @property
    def uses_actions(self) -> bool:
        """Whether the log must have actions."""
        return self.kind != "items"


def check_layout(store: EventStore, layout: LayoutConfig) -> None:
    """Refuses a layout with actions over a log without.

    Raises:
        UserError: As said.
    """
    if layout.uses_actions and "action" not in store.columns:
        raise UserError(
            f"layout {layout.kind!r} reads actions, and {store.manifest.get('source') or 'the log'} has "
            "none; name its action column in data.action, or use layout 'items'"
        )


def training_ranges(split: Split, layout: LayoutConfig, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start, stop) of each user's input events in its log, (B,) int64 each; event ``stop`` is its last
    label."""
    stop = split.train_stop[users] - 1
    return np.maximum(stop - layout.max_events, 0), stop


def training_labels(store: EventStore, split: Split, layout: LayoutConfig, users: np.ndarray) -> np.ndarray:
    """(S,) int64 items that ``training_batch`` of these users has as labels, in its order."""
    start, stop = training_ranges(split, layout, users)
    return store.columns["item_id"][_flat(store.offsets[users] + start + 1, stop - start)]


def training_batch(store: EventStore, split: Split, layout: LayoutConfig, users: np.ndarray) -> JaggedBatch:
    """The most recent ``max_events`` inputs of each user's training prefix, every next event a label.

    Args:
        store: The log.
        split: Says where each user's training events end.
        layout: How events become tokens.
        users: (B,) int64 user indices, each with at least 2 training events.

    Returns:
        A batch without negatives; S = number of input events.
    """
    users = np.asarray(users, np.int64)
    start, stop = training_ranges(split, layout, users)
    assert users.size and (stop >= 1).all(), "a training row needs 2 training events"
    batch, events = _rows(store, layout, users, start, stop)
    step = layout.tokens_per_event
    position = torch.arange(step - 1, batch.num_tokens, step)
    return batch.replace(labels=_labels(position, store.columns["item_id"][events + 1]))


def evaluation_batch(
    store: EventStore, targets: Targets, rows: slice | np.ndarray, layout: LayoutConfig
) -> JaggedBatch:
    """The histories before some targets; the only label of a row is its target, at the last token.

    Args:
        store: The log.
        targets: Held-out events.
        rows: Which targets, in the order wanted.
        layout: How events become tokens.
    """
    users, position = targets.user[rows], targets.position[rows]
    assert users.size and (position >= 1).all(), "a target needs a history"
    batch, _ = _rows(store, layout, users, np.maximum(position - layout.max_events, 0), position)
    items = store.columns["item_id"][store.offsets[users] + position]
    return batch.replace(labels=_labels(batch.last_positions(), items))


def history_batch(
    items: Sequence[np.ndarray],
    timestamps: Sequence[np.ndarray] | None,
    actions: Sequence[np.ndarray] | None,
    query_time: int | Sequence[int] | np.ndarray | None,
    layout: LayoutConfig,
) -> JaggedBatch:
    """Histories that come from no store, to recommend from; no labels.

    Args:
        items: B arrays of dense item ids in time order, none empty.
        timestamps: B arrays of seconds; ``None`` when the model reads no times.
        actions: B arrays of dense actions; ``None`` when the layout reads none.
        query_time: Seconds at which the recommendation is wanted, one for all rows or (B,); needed with
            timestamps.
        layout: How events become tokens.

    Raises:
        UserError: A history is empty, columns differ in length, or a needed column is missing.
    """
    columns: dict[str, list[np.ndarray]] = {"item_id": [np.asarray(row, np.int64) for row in items]}
    if timestamps is not None:
        columns["timestamp"] = [np.asarray(row, np.int64) for row in timestamps]
        if query_time is None:
            raise UserError("a history with times needs query_time, the second at which the recommendation is wanted")
    if layout.uses_actions:
        if actions is None:
            raise UserError(f"layout {layout.kind!r} reads actions: give one for each event of the history")
        columns["action"] = [np.asarray(row, np.int64) for row in actions]
    lengths = np.array([row.size for row in columns["item_id"]], np.int64)
    if not lengths.size or not lengths.all():
        raise UserError("a history is empty; give at least one event to recommend from")
    for name, rows in columns.items():
        if [row.size for row in rows] != lengths.tolist():
            raise UserError(f"the history's {name} column has other lengths than its items")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    flat = {name: np.concatenate(rows) for name, rows in columns.items()}
    users = np.arange(lengths.size)
    asked = np.broadcast_to(np.asarray(query_time, np.int64), users.shape) if timestamps is not None else None
    start = np.maximum(lengths - layout.max_events, 0)
    return _tokens(offsets, flat, layout, users, start, lengths, asked)[0]


def _rows(
    store: EventStore, layout: LayoutConfig, users: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[JaggedBatch, np.ndarray]:
    """Events [start, stop) of each user as tokens; event ``stop`` exists and gives the last
    ``query_time``."""
    check_layout(store, layout)
    times = store.columns.get("timestamp")
    asked = None if times is None else times[store.offsets[users] + stop]
    return _tokens(store.offsets, store.columns, layout, users, start, stop, asked)


def _tokens(
    offsets: np.ndarray,
    columns: dict[str, np.ndarray],
    layout: LayoutConfig,
    users: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    asked: np.ndarray | None,
) -> tuple[JaggedBatch, np.ndarray]:
    """The batch without labels, and the (events,) places of its events in ``columns``."""
    lengths = stop - start
    ends = np.cumsum(lengths)
    events = _flat(offsets[users] + start, lengths)
    item_index = np.arange(events.size) - np.repeat(ends - lengths, lengths)
    step = layout.tokens_per_event
    tokens = {"item_id": columns["item_id"][events]}
    index = {"item_index": item_index, "event": item_index + np.repeat(start, lengths)}
    if "timestamp" in columns:
        tokens["timestamp"] = columns["timestamp"][events]
        following = np.empty_like(tokens["timestamp"])
        following[:-1] = tokens["timestamp"][1:]
        following[ends - 1] = asked
    if layout.uses_actions:
        tokens["action"] = columns["action"][events]
    if step == 2:
        tokens = {name: np.repeat(values, 2) for name, values in tokens.items()}
        index = {name: np.repeat(values, 2) for name, values in index.items()}
    if "timestamp" in columns:
        # An interleaved item token asks for the action of its own event, at that event's time.
        query = tokens["timestamp"].copy()
        query[step - 1 :: step] = following
        tokens |= _seconds(timestamp=tokens["timestamp"], query_time=query)
    total = events.size * step
    index["token_type"] = np.arange(total) % step
    index["segment"] = np.zeros(total, np.int64)
    row_offsets = np.zeros(users.size + 1, np.int64)
    row_offsets[1:] = ends * step
    batch = JaggedBatch(
        offsets=torch.from_numpy(row_offsets),
        max_seq_len=int(lengths.max()) * step,
        num_tokens=total,
        tokens={name: torch.from_numpy(values) for name, values in tokens.items()},
        rows={"sample_key": torch.from_numpy(users.astype(np.int64))},
        index={name: torch.from_numpy(values) for name, values in index.items()},
    )
    return batch, events


def _seconds(**times: np.ndarray) -> dict[str, np.ndarray]:
    """int64 columns as int32 where all of them fit, as seconds since 1970 do until 2038: attention in 16 bits then has
    larger tiles."""
    if all(column.min() >= 0 and column.max() < NARROW_TIMES for column in times.values()):
        return {name: column.astype(np.int32) for name, column in times.items()}
    return times


def _flat(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start[0], start[0]+1, ... (lengths[0] of them), start[1], ...: (sum of lengths,) int64."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(start - (ends - lengths), lengths)


def _labels(position: torch.Tensor, items: np.ndarray) -> Labels:
    return Labels(position=position, item_id=torch.from_numpy(items), weight=torch.ones(items.size))
