"""Which events train, which are held out; the owner of every fitting scope.

A user's events are in time order. ``train_stop[u]`` cuts them: everything fitted (weights, popularity, log_q,
baselines) sees events ``[0, train_stop[u])`` of each user and nothing else. A target is the event at
``position``; its history is ``[0, position)``, so that test histories include the validation event (it is in
the past by then).

::

    leave_one_out   t t t t V T      V validation, T test; users too short for it train whole
    paper           t t t t t T      arXiv 2402.17152: no validation split
    temporal        t t|V . .|T .    one target a user and period: its first event there
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr import config as configs
from gr.data.store import EventStore
from gr.errors import UserError

BLOCK_EVENTS = 1 << 20
"""Events that a pass over a log looks at together: some 30 MiB."""
BINS = 1 << 16


@dataclass(frozen=True)
class Targets:
    """Held-out events.

    Attributes:
        user: (n,) int64 user index, ascending.
        position: (n,) int64 place of the event in its user's log, at least 1: a target has a history.
    """

    user: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return self.user.size


@dataclass(frozen=True)
class Split:
    """Where training ends and what is held out.

    Attributes:
        train_stop: (U,) int64, user u trains on its first ``train_stop[u]`` events.
        valid: Targets to choose with; ``None`` when the split has none.
        test: Targets to report.
        kind: Name of the split.
    """

    train_stop: np.ndarray
    valid: Targets | None
    test: Targets
    kind: str = ""


@dataclass(frozen=True)
class LeaveOneOutConfig:
    """Last event for the test, the one before for validation.

    Attributes:
        min_train_events: Users with fewer than this many events before their two held-out ones train whole.
    """

    kind: str = "leave_one_out"
    min_train_events: int = 1

    def __post_init__(self) -> None:
        if self.min_train_events < 1:
            raise UserError(f"min_train_events is {self.min_train_events}; it must be at least 1, a target's history")


@dataclass(frozen=True)
class PaperConfig:
    """Train on all but the last event, test on the last; nothing is left to choose an epoch with."""

    kind: str = "paper"


@dataclass(frozen=True)
class TemporalConfig:
    """Two moments cut the whole log.

    Attributes:
        valid_time: Seconds; events before it train. ``None``: from the fractions.
        test_time: Seconds; events from it on are the test period. ``None``: from the fractions.
        valid_fraction: Share of all events in the validation period; 0: no validation.
        test_fraction: Share of all events in the test period.
    """

    kind: str = "temporal"
    valid_time: int | None = None
    test_time: int | None = None
    valid_fraction: float = 0.1
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        if (self.valid_time is None) != (self.test_time is None):
            raise UserError("valid_time and test_time must both be given, or neither (then the fractions count)")
        if self.valid_time is not None and self.valid_time > self.test_time:
            raise UserError(f"valid_time is {self.valid_time}; it must not come after test_time {self.test_time}")
        if self.valid_fraction < 0 or self.test_fraction <= 0 or self.valid_fraction + self.test_fraction >= 1:
            raise UserError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} must leave a "
                "training period: valid_fraction >= 0, test_fraction > 0, sum below 1"
            )


def make_split(config: Any, store: EventStore) -> Split:
    """Splits a store as ``config`` (one of SPLITS) says.

    Raises:
        UserError: The split needs times the log lacks, or leaves nothing to train on or to test with.
    """
    split = configs.build(SPLITS, config, store)
    if not len(split.test):
        raise UserError(f"split {config.kind} finds no user with enough events for a test target in {_name(store)}")
    if split.valid is not None and not len(split.valid):
        raise UserError(
            f"split {config.kind} finds no validation target in {_name(store)}; widen its validation period"
        )
    if not (split.train_stop >= 2).any():
        raise UserError(
            f"split {config.kind} leaves no user with 2 training events in {_name(store)}, so nothing to learn from"
        )
    return split


def user_blocks(store: EventStore, at_least: int = 0) -> Iterator[tuple[int, int]]:
    """(first, end) users whose events are looked at together, for passes over logs larger than memory.

    Args:
        store: The log.
        at_least: Events of a block, where ``BLOCK_EVENTS`` are fewer; a single user may have more.
    """
    first, most = 0, max(BLOCK_EVENTS, at_least)
    while first < store.num_users:
        room = int(np.searchsorted(store.offsets, store.offsets[first] + most, side="right")) - 1
        end = max(first + 1, room)
        yield first, end
        first = end


def training_events(store: EventStore, split: Split, first: int = 0, end: int | None = None) -> np.ndarray:
    """(events,) bool, which events of users first..end-1 (``None``: to the last) may be fitted on."""
    users = slice(first, end)
    stop, lengths = split.train_stop[users], np.diff(store.offsets[first : None if end is None else end + 1])
    parts = np.stack([stop, lengths - stop], axis=1).ravel()
    return np.repeat(np.tile([True, False], stop.size), parts)


def training_items(store: EventStore, split: Split, first: int, end: int) -> np.ndarray:
    """(n,) int64 items of the training events of users first..end-1, one user after another."""
    events = slice(store.offsets[first], store.offsets[end])
    return store.columns["item_id"][events][training_events(store, split, first, end)]


def training_counts(store: EventStore, split: Split) -> np.ndarray:
    """(V,) int64 training events of each item."""
    counts = np.zeros(store.num_items, np.int64)
    for first, end in user_blocks(store, store.num_items):
        counts += np.bincount(training_items(store, split, first, end), minlength=store.num_items)
    return counts


def leave_one_out(config: LeaveOneOutConfig, store: EventStore) -> Split:
    """See the module's picture."""
    lengths = store.lengths
    user = np.flatnonzero(lengths >= config.min_train_events + 2)
    stop = lengths.copy()
    stop[user] -= 2
    return Split(stop, Targets(user, lengths[user] - 2), Targets(user, lengths[user] - 1), config.kind)


def paper(config: PaperConfig, store: EventStore) -> Split:
    """Section 4.1.1 of arXiv 2402.17152 and its public code: all but the last item train, the last one is the
    test."""
    lengths = store.lengths
    user = np.flatnonzero(lengths >= 2)
    stop = lengths.copy()
    stop[user] -= 1
    return Split(stop, None, Targets(user, lengths[user] - 1), config.kind)


def temporal(config: TemporalConfig, store: EventStore) -> Split:
    """Cuts at two moments for all users alike; needs real times."""
    store.require_times("the temporal split")
    times = store.columns["timestamp"]
    valid_time, test_time = config.valid_time, config.test_time
    if valid_time is None:
        test_time = ordered(times, min(int(times.size * (1 - config.test_fraction)), times.size - 1))
        share = 1 - config.test_fraction - config.valid_fraction
        valid_time = ordered(times, int(times.size * share)) if config.valid_fraction else test_time
    stop, test_start = _before(store, valid_time), _before(store, test_time)
    lengths = store.lengths
    valid_user = np.flatnonzero((stop >= 1) & (stop < test_start))
    test_user = np.flatnonzero((test_start >= 1) & (test_start < lengths))
    valid = Targets(valid_user, stop[valid_user]) if valid_time < test_time else None
    return Split(stop, valid, Targets(test_user, test_start[test_user]), config.kind)


def ordered(values: np.ndarray, place: int) -> int:
    """``np.sort(values)[place]`` of (n,) int64, by counting in passes over blocks: no copy, and no slower."""
    blocks = [values[lo : lo + BLOCK_EVENTS] for lo in range(0, values.size, BLOCK_EVENTS)]
    low, high = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
    while low < high:
        width = (high - low) // BINS + 1
        counts = np.zeros(BINS, np.int64)
        for block in blocks:
            inside = block[(block >= low) & (block <= high)]
            counts += np.bincount((inside - low) // width, minlength=BINS)
        running = np.cumsum(counts)
        bin_ = int(np.searchsorted(running, place, side="right"))
        place -= int(running[bin_] - counts[bin_])
        low, high = low + bin_ * width, min(high, low + (bin_ + 1) * width - 1)
    return low


def _before(store: EventStore, time: int) -> np.ndarray:
    """(U,) events of each user earlier than ``time``; times ascend within a user."""
    found = np.empty(store.num_users, np.int64)
    for first, end in user_blocks(store):
        offsets = store.offsets[first : end + 1]
        earlier = store.columns["timestamp"][offsets[0] : offsets[-1]] < time
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(earlier, dtype=np.int64)])
        found[first:end] = np.diff(running[offsets - offsets[0]])
    return found


def _name(store: EventStore) -> str:
    return f"{store.manifest.get('source') or 'the log'} ({store.num_users} users, {store.num_events} events)"


SPLITS = {
    "leave_one_out": (LeaveOneOutConfig, leave_one_out),
    "paper": (PaperConfig, paper),
    "temporal": (TemporalConfig, temporal),
}
