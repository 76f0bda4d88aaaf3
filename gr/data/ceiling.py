"""The best possible score on a planted world: exact filtering of what is hidden, then ranking by the posterior.

The ranker knows the law, the visible history (items, times, actions) and the time of the query; it does not know the
user's interest nor which events continued. P(next item | visible history) is exact because both are finite and, given
the interest, the mode of each event is independent. Its expected HR@K is the sum of its K largest probabilities, so
the ceiling carries no sampling noise of the targets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gr.data.planted import Law, PlantedConfig, make_law
from gr.data.split import Targets
from gr.data.store import EventStore

USERS_PER_BLOCK = 512


def predictive(
    law: Law,
    offsets: np.ndarray,
    item_id: np.ndarray,
    timestamp: np.ndarray,
    action: np.ndarray | None,
    query_time: np.ndarray,
    see_times: bool = True,
) -> np.ndarray:
    """P(next item | visible history, time of the query).

    Args:
        law: The world's law.
        offsets: (n+1,) int64 row starts; every history has at least one event.
        item_id: (T,) int64.
        timestamp: (T,) int64 seconds, non-decreasing within a row.
        action: (T,) int64, or ``None`` where the world has no actions.
        query_time: (n,) int64, time of the event to be predicted.
        see_times: ``False`` gives the best ranker that does not see the clock: gaps do not depend on anything hidden,
            so it uses the mean chance to continue for every gap (only exact without ``item_arrival``).

    Returns:
        (n, V) float64, rows sum to 1.
    """
    cfg, n = law.config, len(offsets) - 1
    length = np.diff(offsets)
    leaf = law.leaf[item_id]
    weight = np.log(np.broadcast_to(law.interest_prior, (n, cfg.num_interests))).copy()  # log posterior of z, so far
    counts = np.zeros((n, cfg.num_leaves))
    before, last, previous = (np.zeros(n, dtype=np.int64) for _ in range(3))
    mean = mean_continue(law)

    def chance(now: np.ndarray, then: np.ndarray) -> np.ndarray:
        return law.continues(now - then) if see_times else np.full(len(now), mean)

    for t in range(int(length.max(initial=0))):
        rows = np.flatnonzero(length > t)
        where = offsets[rows] + t
        seen = leaf[where]
        own = law.restart(counts[rows])[np.arange(len(rows)), :, seen]  # (m, K)
        if t == 0:
            likelihood = own
        else:
            c = chance(timestamp[where], previous[rows])[:, None]
            follow = law.follow(before[rows], last[rows])[np.arange(len(rows)), seen]
            likelihood = c * follow[:, None] + (1.0 - c) * own
        weight[rows] += np.log(likelihood)
        if action is not None:
            like = law.like[:, seen].T
            weight[rows] += np.log(np.where(action[where][:, None] == 1, like, 1.0 - like))
        counts[rows, seen] += 1
        before[rows], last[rows] = (seen, seen) if t == 0 else (last[rows], seen)
        previous[rows] = timestamp[where]

    posterior = np.exp(weight - weight.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    c = chance(query_time, previous)[:, None]
    leaves = c * law.follow(before, last) + (1.0 - c) * np.einsum("nk,nkl->nl", posterior, law.restart(counts))
    end = law.leaf_start[:-1] + law.available(query_time)
    total = law.mass[end] - law.mass[law.leaf_start[:-1]]  # (n, L) weight of the items that exist
    result = (leaves / total)[:, law.leaf] * law.weight
    if cfg.item_arrival:
        result[law.arrival[None, :] > query_time[:, None]] = 0.0
    return result


def mean_continue(law: Law) -> float:
    """E[c(gap)] over the log-uniform gaps, by quadrature over the same rounding to whole seconds."""
    cfg = law.config
    u = (np.arange(200_000) + 0.5) / 200_000
    gap = np.rint(cfg.shortest_gap * np.exp(u * np.log(cfg.longest_gap / cfg.shortest_gap)))
    return float(law.continues(gap).mean())


def expected_metrics(probabilities: np.ndarray, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Expected HR@K, NDCG@K and MRR, (n,) each, of ranking each row of (n, V) probabilities in descending order."""
    best = -np.sort(-probabilities, axis=1)
    rank = np.arange(1, best.shape[1] + 1)
    result = {}
    for k in ks:
        top = best[:, :k]
        result[f"hr@{k}"] = top.sum(1)
        result[f"ndcg@{k}"] = (top / np.log2(rank[:k] + 1.0)).sum(1)
    result["mrr"] = (best / rank).sum(1)
    return result


def ceiling(
    store: EventStore,
    cfg: PlantedConfig,
    targets: Targets,
    ks: tuple[int, ...],
    see_times: bool = True,
    mask_seen: bool = False,
    window: int | None = None,
) -> dict[str, float]:
    """Mean expected metrics of the best ranker over some targets of a planted log.

    Args:
        store: A log prepared from ``cfg``; only events before each target are read, and the target's time.
        cfg: The world.
        targets: Held-out events.
        ks: Cut-offs.
        see_times: As in ``predictive``.
        mask_seen: Items of the history cannot be recommended: nobody hits a target that was seen before.
        window: Of the history's last so many events only; ``None``: all.

    Returns:
        ``hr@K``, ``ndcg@K`` and ``mrr``.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for start, length, events, probabilities in _blocks(store, cfg, targets, see_times):
        if mask_seen:
            row = np.repeat(np.arange(len(length)), length)
            recent = slice(None) if window is None else events >= (start + length - window)[row]
            probabilities[row[recent], store.columns["item_id"][events[recent]]] = 0.0
        for name, values in expected_metrics(probabilities, ks).items():
            parts.setdefault(name, []).append(values)
    return {name: float(np.concatenate(values).mean()) for name, values in parts.items()}


def ideal_scores(
    store: EventStore, cfg: PlantedConfig, targets: Targets, see_times: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """What the best ranker makes of the very targets that a planted log drew, beside which a model's score has the same
    sampling noise.

    Args:
        store, cfg, targets, see_times: As of ``ceiling``.

    Returns:
        (n,) float64 -log P(target), and (n,) int64 items that are likelier than the target.
    """
    losses, better = [], []
    for start, length, _, probabilities in _blocks(store, cfg, targets, see_times):
        own = probabilities[np.arange(len(length)), store.columns["item_id"][start + length]]
        losses.append(-np.log(own))
        better.append((probabilities > own[:, None]).sum(1))
    return np.concatenate(losses), np.concatenate(better)


def _blocks(
    store: EventStore, cfg: PlantedConfig, targets: Targets, see_times: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """A block of targets at a time: their users' first events, lengths of histories, the histories' events, and (n, V)
    ``predictive`` of them."""
    law, times, actions = make_law(cfg), store.columns["timestamp"], store.columns.get("action")
    for lo in range(0, len(targets), USERS_PER_BLOCK):
        start = store.offsets[targets.user[lo : lo + USERS_PER_BLOCK]]
        length = targets.position[lo : lo + USERS_PER_BLOCK]
        offsets = np.concatenate([[0], np.cumsum(length)])
        events = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], length)
        probabilities = predictive(
            law,
            offsets,
            store.columns["item_id"][events],
            times[events],
            None if actions is None else actions[events],
            times[start + length],
            see_times,
        )
        yield start, length, events, probabilities
