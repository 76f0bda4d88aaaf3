"""The leak audit: what would make a number too good, looked for in the data that the model was really given.

Each check returns findings; a clean run has none. Checks read batches as they come from the loaders, and
compare them with the store and the split, so a mistake in the layout, the loader or the split shows whatever
its cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr.data.batch import JaggedBatch
from gr.data.split import BLOCK_EVENTS, Split, Targets
from gr.data.store import EventStore
from gr.evaluation.metrics import Estimate
from gr.evaluation.ranking import seen_pairs


@dataclass(frozen=True)
class Finding:
    """What makes results untrustworthy: ``name`` of the check and one sentence of ``detail``."""

    name: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Plain data for ``results.json``."""
        return {"name": self.name, "detail": self.detail}


def audit(
    store: EventStore,
    split: Split,
    evaluation: Any = None,
    training: Iterable[JaggedBatch] = (),
    metrics: Mapping[str, Mapping[str, Estimate]] | None = None,
    ceiling: Mapping[str, float] | None = None,
) -> list[Finding]:
    """All checks whose input is given.

    Args:
        store: The log.
        split: The split in use.
        evaluation: A loader as ``rank_targets`` takes it, or ``None``.
        training: Training batches, say one epoch's.
        metrics: Of each model or baseline by label.
        ceiling: Best possible mean of each metric, for planted data.
    """
    findings = audit_split(store, split)
    if evaluation is not None:
        findings += audit_evaluation(evaluation)
    findings += audit_training(store, split, training)
    if metrics and ceiling:
        for label, values in metrics.items():
            findings += audit_ceiling(values, ceiling, label)
    return findings


def audit_split(store: EventStore, split: Split) -> list[Finding]:
    """Held-out events that are also training events, or are held out twice."""
    findings = []
    pieces = [("test", split.test)] + ([("validation", split.valid)] if split.valid is not None else [])
    for name, targets in pieces:
        trained = targets.position < split.train_stop[targets.user]
        if trained.any():
            where = _where(targets.user[trained], targets.position[trained])
            findings.append(
                Finding("train_test_overlap", f"{trained.sum()} {name} targets are training events: {where}")
            )
        outside = (targets.position < 1) | (targets.position >= np.diff(store.offsets)[targets.user])
        if outside.any():
            where = _where(targets.user[outside], targets.position[outside])
            findings.append(
                Finding("target_outside_log", f"{outside.sum()} {name} targets name no event with a past: {where}")
            )
    keys = np.concatenate([_key(store, t.user, t.position) for _, t in pieces])
    twice = len(keys) - len(np.unique(keys))
    if twice:
        findings.append(Finding("duplicate_target", f"{twice} held-out events are targets more than once"))
    return findings


def audit_evaluation(loader: Any) -> list[Finding]:
    """Inputs that hold the target or anything later, labels that are not the target, wrong query times."""
    store, targets = loader.store, loader.targets
    times = store.columns.get("timestamp")
    counts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(name: str, rows: np.ndarray, bad: np.ndarray) -> None:
        if bad.any():
            counts.setdefault(name, []).append((user[rows[bad]], position[rows[bad]]))

    for rows, batch in loader:
        user, position = targets.user[rows], targets.position[rows]
        every = np.arange(len(user))
        token_row, event = _token_row(batch), batch.index["event"].numpy()
        start = np.asarray(store.offsets)[user]
        last = batch.last_positions().numpy()

        add("target_in_input", token_row, event >= position[token_row])
        place = np.minimum(start[token_row] + event, store.offsets[-1] - 1)
        item = batch.tokens["item_id"].numpy()
        add("input_not_from_log", token_row, item != store.columns["item_id"][place])
        add("row_of_other_user", every, batch.rows["sample_key"].numpy() != user)
        truth = store.columns["item_id"][start + position]
        if batch.labels is None or len(batch.labels.item_id) != len(user):
            add("label_not_target", every, np.ones(len(user), dtype=bool))
        else:
            wrong = (batch.labels.item_id.numpy() != truth) | (batch.labels.position.numpy() != last)
            add("label_not_target", every, wrong)
        if times is not None and "query_time" in batch.tokens:
            asked = times[start + position]
            query = batch.tokens["query_time"].numpy()
            add("query_time", every, query[last] != asked)
            add("later_than_target", token_row, query > asked[token_row])
        if times is not None and "timestamp" in batch.tokens:
            add(
                "later_than_target",
                token_row,
                batch.tokens["timestamp"].numpy() > times[start + position][token_row],
            )

    findings = []
    for name, parts in counts.items():
        pairs = np.unique(np.concatenate([np.stack(part, axis=1) for part in parts]), axis=0)
        findings.append(Finding(name, f"{len(pairs)} targets: {EXPLAIN[name]}; {_where(pairs[:, 0], pairs[:, 1])}"))
    return findings


EXPLAIN = {
    "target_in_input": "the input holds the target's event or a later one",
    "input_not_from_log": "an input token's item is not that of the event it claims to be",
    "row_of_other_user": "the row's sample_key is not the target's user",
    "label_not_target": "the label is not the target's item at the row's last token",
    "query_time": "the last token's query_time is not the target's time",
    "later_than_target": "a token carries a time later than the target's",
}


def audit_training(store: EventStore, split: Split, batches: Iterable[JaggedBatch]) -> list[Finding]:
    """Training inputs or labels that are held out."""
    held = [split.test] + ([split.valid] if split.valid is not None else [])
    held_keys = np.unique(np.concatenate([_key(store, t.user, t.position) for t in held]))
    overlap: list[np.ndarray] = []
    beyond = wrong = 0
    for batch in batches:
        user = batch.rows["sample_key"].numpy()[_token_row(batch)]
        event = batch.index["event"].numpy()
        used_user, used_event = user, event
        if batch.labels is not None:
            # A label is the event after its token's own.
            at = batch.labels.position.numpy()
            label_user, label_event = user[at], event[at] + 1
            place = np.minimum(store.offsets[label_user] + label_event, store.offsets[-1] - 1)
            wrong += int((store.columns["item_id"][place] != batch.labels.item_id.numpy()).sum())
            used_user, used_event = np.concatenate([user, label_user]), np.concatenate([event, label_event])
        key = _key(store, used_user, used_event)
        overlap.append(np.unique(key[np.isin(key, held_keys)]))
        beyond += len(np.unique(key[used_event >= split.train_stop[used_user]]))
    findings = []
    shared = np.unique(np.concatenate(overlap)) if overlap else np.zeros(0, dtype=np.int64)
    if len(shared):
        where = _where(*np.divmod(shared, _stride(store)))
        findings.append(Finding("train_test_overlap", f"{len(shared)} held-out events are trained on: {where}"))
    elif beyond:
        findings.append(
            Finding("trained_beyond_split", f"{beyond} events after their user's train_stop are trained on")
        )
    if wrong:
        findings.append(Finding("label_not_next", f"{wrong} training labels are not the event after their token's own"))
    return findings


def audit_ceiling(metrics: Mapping[str, Estimate], ceiling: Mapping[str, float], label: str = "model") -> list[Finding]:
    """Scores that no ranker can reach: more than 3 standard errors above the ceiling of the same metric."""
    findings = []
    for name in metrics.keys() & ceiling.keys():
        value, best = metrics[name], ceiling[name]
        # The spread of a few equal scores is 0; a score at the ceiling itself would vary by no more than this.
        se = max(value.se, (best * (1.0 - best) / value.num) ** 0.5)
        if value.mean > best + 3.0 * se:
            detail = f"{label} has {name} {value.mean:.4f} +- {value.se:.4f}, and the best possible is {best:.4f}"
            findings.append(Finding("above_ceiling", detail))
    return sorted(findings, key=lambda finding: finding.detail)


def repeated_targets(store: EventStore, targets: Targets, window: int | None = None) -> tuple[int, int]:
    """How many targets were seen before, and how many of these at the very same second.

    Neither is a leak by itself (people repeat themselves; a click and a purchase share a second), but both make
    a score easier to reach, so they are told beside it. With a ``window`` the first count is of that many last events.
    """
    return int(repeats(store, targets, window).sum()), int(_repeated_in_history(store, targets).sum())


def repeats(store: EventStore, targets: Targets, window: int | None = None) -> np.ndarray:
    """(n,) bool: the target's item is among the user's earlier events, or the last ``window`` of them."""
    found = np.zeros(len(targets), dtype=bool)
    read = targets.position if window is None else np.minimum(targets.position, window)
    block = np.cumsum(read) // BLOCK_EVENTS  # of each target
    for rows in np.split(np.arange(len(found)), np.flatnonzero(np.diff(block)) + 1):
        user, position = targets.user[rows], targets.position[rows]
        row, item = seen_pairs(store, user, position, window)
        truth = store.columns["item_id"][store.offsets[user] + position]
        found[rows[row[item == truth[row]]]] = True
    return found


def _repeated_in_history(store: EventStore, targets: Targets) -> np.ndarray:
    """(n,) bool: an earlier event of the user has the target's item and time. All False without times."""
    times, item = store.columns.get("timestamp"), store.columns["item_id"]
    found = np.zeros(len(targets.user), dtype=bool)
    if times is None:
        return found
    start = store.offsets[targets.user]
    at = start + targets.position
    active = np.arange(len(found))
    step = 1
    while len(active):  # times ascend, so only the run of events at the target's own second is walked back
        before = at[active] - step
        active = active[before >= start[active]]
        active = active[times[at[active] - step] == times[at[active]]]
        found[active] |= item[at[active] - step] == item[at[active]]
        active = active[~found[active]]
        step += 1
    return found


def _token_row(batch: JaggedBatch) -> np.ndarray:
    """(T,) int64 row of each token."""
    offsets = batch.offsets.numpy()
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _stride(store: EventStore) -> int:
    return int(np.diff(store.offsets).max(initial=0)) + 1


def _key(store: EventStore, user: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One int64 for each (user, position)."""
    return user * np.int64(_stride(store)) + position


def _where(user: np.ndarray, position: np.ndarray) -> str:
    shown = ", ".join(
        f"(user {u}, position {p})" for u, p in zip(user[:3].tolist(), position[:3].tolist(), strict=True)
    )
    return f"first ones {shown}"
