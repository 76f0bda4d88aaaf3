"""Parts of the test targets on which a mean may hide something: short histories, rare items, repeats, new items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr.data.split import Split, Targets, training_counts
from gr.data.store import EventStore
from gr.evaluation.audit import repeats

HEAD, TORSO = 0.5, 0.8  # shares of the training events


@dataclass(frozen=True)
class Slice:
    """Some of the targets.

    Attributes:
        group: ``history``, ``popularity`` or ``repeat``; the slices of a group are disjoint and hold every target.
        name: Says which, in words.
        rows: (n,) bool over the targets.
    """

    group: str
    name: str
    rows: np.ndarray


GROUPS = ("history", "popularity", "repeat")


def make_slices(store: EventStore, split: Split, user: np.ndarray, position: np.ndarray) -> list[Slice]:
    """Every slice with a target in it.

    * ``history``: quarters of the targets by the number of the user's earlier events (fewer where many are equal).
    * ``popularity``, of the target in training events: items from the most frequent one on make the head until
      50 % of the training events are covered, the torso until 80 %, the rest is the tail; items of equal count stay
      together. Items without a training event, which no model can have learned, stand apart.
    * ``repeat``: the target's item is among the user's earlier events, or is not.

    Args:
        store: The log.
        split: Says which events train.
        user: (n,) int64, whose target it is.
        position: (n,) int64, its place in the user's log.
    """
    groups = zip(
        GROUPS,
        (
            _by_history(position),
            _by_popularity(store, split, user, position),
            _by_repeat(store, user, position),
        ),
        strict=True,
    )
    return [Slice(group, name, rows) for group, parts in groups for name, rows in parts if rows.any()]


def _by_history(position: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Upper ends are values that occur, so a slice's name tells exactly what is in it."""
    ends = np.unique(np.quantile(position, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    parts, low = [], int(position.min())
    for end in ends.astype(np.int64).tolist():
        words = f"{low:,}" if low == end else f"{low:,} to {end:,}"
        parts.append((f"history {words}", (position >= low) & (position <= end)))
        low = end + 1
    return parts


def _by_popularity(
    store: EventStore, split: Split, user: np.ndarray, position: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    count = training_counts(store, split)
    values, kind, items = np.unique(count, return_inverse=True, return_counts=True)
    events = values * items
    before = events[::-1].cumsum()[::-1] - events  # training events of items with a higher count
    share = (before / events.sum())[kind]
    found = store.columns["item_id"][store.offsets[user] + position]
    known, at = count[found] > 0, share[found]
    return [
        ("head items", known & (at < HEAD)),
        ("torso items", known & (at >= HEAD) & (at < TORSO)),
        ("tail items", known & (at >= TORSO)),
        ("new items", ~known),
    ]


def _by_repeat(store: EventStore, user: np.ndarray, position: np.ndarray) -> list[tuple[str, np.ndarray]]:
    again = repeats(store, Targets(user, position))
    return [("seen before", again), ("not seen before", ~again)]
