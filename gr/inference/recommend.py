"""What a run would show a user, or somebody with a history that is typed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gr.data.layout import history_batch
from gr.errors import UserError
from gr.evaluation.ranking import masked_events
from gr.inference.load import Loaded
from gr.inference.lookup import find_item, find_user, item_id, item_title, show_span, show_time

SAMPLE = 1_000_000  # events that typical gaps and actions are read from


@dataclass(frozen=True)
class Row:
    """One recommendation.

    Attributes:
        rank: 1 is best.
        item: Dense index.
        item_id: Original id.
        title: Title.
        score: The model's.
        held_out: Whether this is the event that the user really had next.
        seen: Whether it is in the history.
    """

    rank: int
    item: int
    item_id: str | int
    title: str
    score: float
    held_out: bool = False
    seen: bool = False


@dataclass(frozen=True)
class Event:
    """One event of a history; ``ago`` is in seconds before the recommendation, ``None`` without times."""

    item: int
    title: str
    ago: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """What the user really had next.

    Attributes:
        item: Dense index.
        title: Title.
        rank: Its middle rank among all items that may be shown. Where it may not, because it was seen before, it
            stands behind them all, as in the evaluation.
        candidates: How many items it was ranked among, itself included.
        part: ``test`` or ``validation``.
    """

    item: int
    title: str
    rank: float
    candidates: int
    part: str


@dataclass(frozen=True)
class Recommendations:
    """Rows, best first (iterate over it), with the history that led to them.

    Attributes:
        rows: Up to k.
        history: The whole visible past, oldest first.
        held_out: ``None`` where nothing was held out.
        user: Original id, ``None`` for a typed history.
        query_time: Seconds at which the recommendation was asked for; ``None`` without times.
        notes: What was assumed, in sentences.
    """

    rows: list[Row]
    history: list[Event]
    held_out: HeldOut | None
    user: str | int | None
    query_time: int | None
    notes: list[str]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain data, for a data frame."""
        return [dataclasses.asdict(row) for row in self.rows]


@dataclass(frozen=True)
class Past:
    """A history as arrays, and what came next where that is known.

    Attributes:
        items: (n,) int64 dense indices, oldest first.
        timestamps: (n,) int64 seconds, ``None`` if the log has none.
        actions: (n,) int64, ``None`` if the log has none.
        query_time: Seconds at which the recommendation is asked for.
        target: Dense index of the held-out item.
        part: Where the target was held out: ``test`` or ``validation``.
        user: Original id.
        notes: What was assumed.
    """

    items: np.ndarray
    timestamps: np.ndarray | None
    actions: np.ndarray | None
    query_time: int | None
    target: int | None = None
    part: str = ""
    user: str | int | None = None
    notes: tuple[str, ...] = ()


def recommend(
    loaded: Loaded,
    *,
    user: str | int | None = None,
    history: Sequence[str | int] | None = None,
    k: int = 10,
    at: int | None = None,
    include_seen: bool | None = None,
    whole: bool = False,
) -> Recommendations:
    """The k best items for a user of the log, or for a typed history.

    Args:
        loaded: From ``load_run``.
        user: Original id. The history is what the user had before the held-out event.
        history: Titles or ids, oldest first, instead of a user.
        k: How many.
        at: Seconds: the user as of that time (only earlier events count), or when a typed history is asked.
        include_seen: Whether items of the history may be shown; ``None``: as the run was evaluated.
        whole: The user's history is all of the log, the held-out events too, as a service would have it.

    Raises:
        UserError: Unknown user or item, no events before ``at``, a log without times, a k below 1.
    """
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    if (user is None) == (history is None):
        raise UserError("give either a user or a history, not both and not neither")
    if at is not None:
        loaded.store.require_times("a recommendation at a given time")
    if history is not None:
        past = typed_past(loaded, history, at)
    else:
        past = user_past(loaded, find_user(loaded.store, user), at, whole)
    rows, held_out = _ask(loaded, past, k, include_seen)
    events = [
        Event(
            int(item),
            item_title(loaded.store, int(item)),
            None if past.timestamps is None else int(past.query_time - past.timestamps[i]),
        )
        for i, item in enumerate(past.items)
    ]
    return Recommendations(rows, events, held_out, past.user, past.query_time, list(past.notes))


def hidden_items(loaded: Loaded, items: np.ndarray, include_seen: bool | None) -> np.ndarray:
    """Those of a history's items (n,) that may not be shown.

    Args:
        loaded: The run.
        items: Dense indices, oldest first.
        include_seen: Whether all may be; ``None``: as the run was evaluated.
    """
    rule = loaded.config.evaluation.mask_seen if include_seen is None else not include_seen
    if not rule:
        return items[:0]
    window = masked_events(rule, loaded.layout)
    return items if window is None else items[-window:]


def user_past(loaded: Loaded, u: int, at: int | None = None, whole: bool = False) -> Past:
    """The events of the user with index ``u`` before the held-out one (``whole``: all), and before ``at``."""
    store, split = loaded.store, loaded.split
    shown = store.user_ids[u].as_py()
    events = slice(int(store.offsets[u]), int(store.offsets[u + 1]))
    columns = {name: values[events] for name, values in store.columns.items()}
    times = columns.get("timestamp")
    held_out = {"validation": _position(split.valid, u), "test": _position(split.test, u)}
    stop = len(columns["item_id"]) if whole or held_out["test"] is None else held_out["test"]
    if at is not None:
        stop = min(stop, int(np.searchsorted(times, at, side="left")))
        if stop == 0:
            raise UserError(
                f"user {shown!r} has no event before {show_time(at)}; the first is at {show_time(int(times[0]))}"
            )
    part = next((name for name, position in held_out.items() if position == stop), "")
    notes = []
    if not part:
        notes.append("Nothing was held out at this point of the user's history, so there is no answer to compare with.")
    if stop < split.train_stop[u]:
        notes.append("The model was trained on this user's later events: no fair test.")
    query_time = at
    if times is not None and at is None:
        query_time = int(times[stop] if part else times[stop - 1])
        notes.append(f"Asked at the time of the {'held-out' if part else 'last'} event, {show_time(query_time)}.")
    return Past(
        items=columns["item_id"][:stop],
        timestamps=None if times is None else times[:stop],
        actions=columns["action"][:stop] if "action" in columns else None,
        query_time=query_time,
        target=int(columns["item_id"][stop]) if part else None,
        part=part,
        user=shown,
        notes=tuple(notes),
    )


def typed_past(loaded: Loaded, history: Sequence[str | int], at: int | None = None) -> Past:
    """A typed history. Times and actions that the model reads are assumed, and each assumption is noted."""
    store = loaded.store
    items = np.array([find_item(store, entry) for entry in history if str(entry).strip()], np.int64)
    if not items.size:
        raise UserError("the history is empty; give at least one title or id")
    notes, times, actions = [], None, None
    if store.has_times:
        query_time = int(store.columns["timestamp"].max()) if at is None else at
        gap = typical_gap(store.offsets, store.columns["timestamp"])
        times = query_time - gap * np.arange(items.size, 0, -1, dtype=np.int64)
        when = "the end of the log" if at is None else "the given time"
        notes.append(
            f"Assumed times: one event every {show_span(gap)} (the log's median gap), asked at {when}, "
            f"{show_time(query_time)}."
        )
    if loaded.layout.uses_actions:
        common = int(np.bincount(store.columns["action"][:SAMPLE]).argmax())
        actions = np.full(items.size, common, np.int64)
        notes.append(f"Assumed actions: {common}, the log's most common one, for every event.")
    return Past(items, times, actions, query_time if store.has_times else None, notes=tuple(notes))


def typical_gap(offsets: np.ndarray, timestamps: np.ndarray) -> int:
    """Median seconds between neighbouring events of one user, at least 1."""
    sample = timestamps[:SAMPLE]
    inside = np.ones(sample.size, bool)
    inside[offsets[:-1][offsets[:-1] < sample.size]] = False  # a user's first event has no gap before it
    gaps = np.diff(sample, prepend=sample[:1])[inside]
    return max(1, int(np.median(gaps))) if gaps.size else 1


def _position(targets: Any, user: int) -> int | None:
    if targets is None:
        return None
    found = int(np.searchsorted(targets.user, user))
    return int(targets.position[found]) if found < len(targets) and targets.user[found] == user else None


def _ask(loaded: Loaded, past: Past, k: int, include_seen: bool | None) -> tuple[list[Row], HeldOut | None]:
    store, model = loaded.store, loaded.model
    batch = history_batch(
        [past.items],
        None if past.timestamps is None else [past.timestamps],
        None if past.actions is None else [past.actions],
        past.query_time,
        loaded.layout,
    ).to(loaded.device)
    known = set(past.items.tolist())
    barred = torch.zeros(1, store.num_items, dtype=torch.bool)
    barred[0, torch.from_numpy(np.array(hidden_items(loaded, past.items, include_seen)))] = True
    with torch.no_grad():
        ranked = model.recommend(batch, k, barred.to(loaded.device))
        scores = model.scores(batch, (0, store.num_items))[0].double().cpu() if past.target is not None else None
    rows = []
    for item, score in zip(ranked.items[0].tolist(), ranked.scores[0].tolist(), strict=True):
        if item >= 0:
            rows.append(
                Row(
                    len(rows) + 1,
                    item,
                    item_id(store, item),
                    item_title(store, item),
                    score,
                    held_out=item == past.target,
                    seen=item in known,
                )
            )
    if scores is None:
        return rows, None
    if scores.isnan().any():
        raise UserError("the model's scores are not numbers; its training diverged, train again with a smaller lr")
    shown = ~barred[0]
    hidden = not bool(shown[past.target])
    shown[past.target] = False
    others, own = scores[shown], scores[past.target]
    rank = int((others > own).sum()) + int((others == own).sum()) / 2 + 1
    rank = others.numel() + 1.0 if hidden else rank
    return rows, HeldOut(past.target, item_title(store, past.target), rank, int(shown.sum()) + 1, past.part)
