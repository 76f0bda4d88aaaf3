"""Sequence-aware item-to-item neighbours: what stood near the recent items in other users' training events.

::

    s(i -> j) = count_i^-source_exponent * count_j^-popularity_exponent *
                sum over d = 1..window of w(d) C_d(i, j)
    score(j)  = sum over b = 0..history-1 of decay^b * s(item b steps back -> j)

with C_d(i, j) the number of times j stands d events after i (``direction`` "after") or d events after or
before it ("both"), and w(d) = decay^(d-1) ("power") or 1/d ("inverse"). Direction "both" with both exponents
1/2 is the cosine form. No neighbours at all: items follow by popularity, below every item with neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import sparse

from gr.data.batch import JaggedBatch
from gr.errors import UserError
from gr.evaluation.baselines.base import CountingRecommender, Scorer, histories
from gr.evaluation.baselines.statistics import TrainingStatistics

# From this fill on (V, V) multiplies faster as a dense matrix, which is then at most 5 times larger.
DENSE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class ItemKNNConfig:
    """See the formulas above."""

    kind: str = "item_knn"
    window: int = 5
    history: int = 5
    decay: float = 0.7
    popularity_exponent: float = 0.25
    source_exponent: float = 0.0
    direction: Literal["after", "both"] = "after"
    distance: Literal["power", "inverse"] = "power"

    def __post_init__(self) -> None:
        for name in ("window", "history"):
            if getattr(self, name) < 1:
                raise UserError(f"ItemKNN baseline: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.decay <= 1:
            raise UserError(f"ItemKNN baseline: decay is {self.decay}; it must lie in (0, 1]")


class ItemKNN(CountingRecommender):
    """Scores are float32 sums of at most ``history`` rows of s."""

    def __init__(self, config: ItemKNNConfig, statistics: TrainingStatistics) -> None:
        self.num_items = statistics.num_items
        self.config = config
        self.similarity = similarity(config, statistics)
        level = statistics.popularity_level
        below = level / (level.max(initial=0) + 1.0) - 1.0  # in [-1, 0)
        self.fallback = torch.from_numpy(below.astype(np.float32))

    def scorer(self, batch: JaggedBatch) -> Scorer:
        history = histories(batch)
        recent = history.steps_back < self.config.history
        weight = np.float32(self.config.decay) ** history.steps_back[recent].astype(np.float32)
        shape = (len(history.offsets) - 1, self.num_items)
        query = sparse.coo_array((weight, (history.row[recent], history.items[recent])), shape=shape).tocsr()
        evidence = query @ self.similarity  # (B, V): sparse, or dense when the similarity is
        if sparse.issparse(evidence):
            evidence = evidence.tocsc()  # columns are then cut without a scan

        def score(span: tuple[int, int]) -> torch.Tensor:
            values = evidence[:, span[0] : span[1]]
            values = torch.from_numpy(values.toarray() if sparse.issparse(values) else np.ascontiguousarray(values))
            return torch.where(values > 0, values, self.fallback[span[0] : span[1]])

        return score


def similarity(config: ItemKNNConfig, statistics: TrainingStatistics) -> sparse.csr_array | np.ndarray:
    """(V, V) float32 s(i -> j), CSR, or dense where that is small and faster."""
    total = None
    for d in range(1, config.window + 1):
        weight = np.float32(config.decay ** (d - 1) if config.distance == "power" else 1.0 / d)
        part = statistics.pairs(d) * weight
        total = part if total is None else total + part
    if config.direction == "both":
        total = (total + total.T).tocsr()
    count = np.maximum(statistics.counts, 1).astype(np.float64)
    total.data *= (count**-config.popularity_exponent).astype(np.float32)[total.indices]
    total.data *= np.repeat((count**-config.source_exponent).astype(np.float32), np.diff(total.indptr))
    return total.toarray() if total.nnz > DENSE_SHARE * statistics.num_items**2 else total
