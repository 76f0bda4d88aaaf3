"""Choosing a baseline's setting by validation NDCG@10, so that the bar is as high as counting can put it.

Tests never choose anything: settings are fitted on training events, compared on validation targets, and the
chosen one goes to the test as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr.data.batch import JaggedBatch
from gr.data.layout import LayoutConfig
from gr.data.loader import EvalLoader
from gr.data.split import Split, Targets
from gr.data.store import EventStore
from gr.errors import UserError
from gr.evaluation.baselines import BASELINES, GRIDS, LABELS, CountingRecommender, TrainingStatistics, fit, setting
from gr.evaluation.metrics import per_target
from gr.evaluation.ranking import SeenRule, rank_targets

METRIC = "ndcg@10"
BATCH = 256
MAX_USERS = 5000  # validation targets that choose; the standard error of NDCG@10 is then at most 0.0071
MAX_SCORES = 10**8  # scores a setting may cost; beyond it fewer users choose, but never fewer than MIN_USERS
MIN_USERS = 1000


@dataclass(frozen=True)
class Tuned:
    """A baseline at its best setting.

    Attributes:
        kind: Name in BASELINES.
        config: The chosen setting.
        recommender: Fitted with it on training events.
        rows: One dict a setting tried: ``setting`` (words), ``ndcg@10`` (validation mean; ``None`` without a
            validation split), ``users`` (validation targets that it was averaged over) and ``chosen``.
    """

    kind: str
    config: Any
    recommender: CountingRecommender
    rows: list[dict[str, Any]]

    @property
    def setting(self) -> str:
        """The chosen setting in words."""
        return setting(self.config)

    def headline(self) -> str:
        """One line: what was chosen, on what."""
        label, value = LABELS[self.kind], max((row[METRIC] or 0.0) for row in self.rows)
        if self.rows[0][METRIC] is None:
            return f"{label}: no validation split, so its default is used: {self.setting}"
        if len(self.rows) == 1:
            return f"{label}: validation {METRIC} {value:.4f}"
        return f"{label}: best of {len(self.rows)} settings, validation {METRIC} {value:.4f}: {self.setting}"


@dataclass(frozen=True)
class _Batches:
    """Batches built once and ranked by every setting; what ``rank_targets`` asks of a loader."""

    store: EventStore
    targets: Targets
    batches: list[tuple[np.ndarray, JaggedBatch]]
    layout: LayoutConfig

    def __iter__(self) -> Iterator[tuple[np.ndarray, JaggedBatch]]:
        return iter(self.batches)


def tune(
    kind: str,
    store: EventStore,
    split: Split,
    layout: LayoutConfig,
    mask_seen: SeenRule,
    *,
    grid: Sequence[Any] | None = None,
    max_users: int | None = None,
    seed: int = 0,
    statistics: TrainingStatistics | None = None,
) -> Tuned:
    """Fits every setting of a grid on training events and keeps the best on validation targets.

    Args:
        kind: Name in BASELINES.
        store: The log.
        split: Its ``valid`` targets choose; ``None`` there: the grid's first setting is taken.
        layout: The model's, so that baselines read histories of the same length as the model.
        mask_seen: As in ``rank_targets``.
        grid: Settings; default ``GRIDS[kind]``.
        max_users: Validation targets to choose on, drawn by ``seed``; default at most 5000, fewer when V is
            large.
        seed: Of that draw.
        statistics: Training counts to share between kinds.

    Returns:
        The chosen baseline and the whole grid; ties go to the earlier setting.
    """
    return _tune(
        kind,
        grid,
        store,
        split,
        validation_batches(store, split, layout, max_users, seed),
        mask_seen,
        statistics,
    )


def tune_all(
    store: EventStore,
    split: Split,
    layout: LayoutConfig,
    mask_seen: SeenRule,
    *,
    kinds: Sequence[str] = tuple(BASELINES),
    max_users: int | None = None,
    seed: int = 0,
) -> dict[str, Tuned]:
    """``tune`` for several kinds on shared counts and shared validation batches."""
    statistics = TrainingStatistics(store, split)
    batches = validation_batches(store, split, layout, max_users, seed)
    return {kind: _tune(kind, None, store, split, batches, mask_seen, statistics) for kind in kinds}


def validation_batches(
    store: EventStore, split: Split, layout: LayoutConfig, max_users: int | None, seed: int
) -> _Batches | None:
    """The validation targets that choose, as batches, alike on every process; ``None`` without any."""
    if split.valid is None:
        return None
    size = max_users or min(MAX_USERS, max(MIN_USERS, MAX_SCORES // store.num_items))
    total = len(split.valid.user)
    rows = np.arange(total)
    if total > size:
        rows = np.sort(np.random.default_rng(seed).choice(total, size, replace=False))
    targets = Targets(split.valid.user[rows], split.valid.position[rows])
    return _Batches(store, targets, list(EvalLoader(store, targets, layout, BATCH)), layout)


def _tune(
    kind: str,
    grid: Sequence[Any] | None,
    store: EventStore,
    split: Split,
    batches: _Batches | None,
    mask_seen: SeenRule,
    statistics: TrainingStatistics | None,
) -> Tuned:
    if kind not in BASELINES:
        raise UserError(f"baseline {kind!r} is unknown; it must be one of {', '.join(BASELINES)}")
    statistics = statistics or TrainingStatistics(store, split)
    grid = list(GRIDS[kind] if grid is None else grid)
    if batches is None:
        rows = [{"setting": setting(grid[0]), METRIC: None, "users": 0, "chosen": True}]
        return Tuned(kind, grid[0], fit(grid[0], store, split, statistics), rows)
    rows, best, kept = [], -1.0, None
    for config in grid:
        recommender = fit(config, store, split, statistics)
        value = float(per_target(rank_targets(recommender, batches, mask_seen), METRIC).mean())
        rows.append({"setting": setting(config), METRIC: value, "users": len(batches.targets.user), "chosen": False})
        if value > best:
            best, kept = value, (len(rows) - 1, config, recommender)
    assert kept is not None
    rows[kept[0]]["chosen"] = True
    return Tuned(kind, kept[1], kept[2], rows)
