"""Recommend what was just seen: distinct history items, most recent first, then everything else by
popularity.

Repeats are common in some logs (games, music), and there a learned model may have learned no more than this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gr.data.batch import JaggedBatch
from gr.evaluation.baselines.base import CountingRecommender, Scorer, histories
from gr.evaluation.baselines.statistics import TrainingStatistics


@dataclass(frozen=True, kw_only=True)
class RepeatLastConfig:
    """Nothing to set."""

    kind: str = "repeat_last"


class RepeatLast(CountingRecommender):
    """score(j) = popularity level of j, or above all when j is in the history: the later, the higher."""

    def __init__(self, config: RepeatLastConfig, statistics: TrainingStatistics) -> None:
        self.num_items = statistics.num_items
        self.level = statistics.popularity_level.astype(np.float64)

    def scorer(self, batch: JaggedBatch) -> Scorer:
        history = histories(batch)
        row, items, steps_back = history.row, history.items, history.steps_back
        top = self.level.max(initial=0.0) + 1.0 + steps_back.max(initial=0)

        def score(span: tuple[int, int]) -> torch.Tensor:
            lo, hi = span
            values = np.tile(self.level[lo:hi], (len(history.offsets) - 1, 1))
            inside = (items >= lo) & (items < hi)
            # Oldest first: where an item stands several times, the last assignment, its latest event, stays.
            values[row[inside], items[inside] - lo] = top - steps_back[inside]
            return torch.from_numpy(values)

        return score
