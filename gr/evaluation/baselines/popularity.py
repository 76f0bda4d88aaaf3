"""The same list for everybody: items by how often they stand in the training events."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gr.data.batch import JaggedBatch
from gr.evaluation.baselines.base import CountingRecommender, Scorer
from gr.evaluation.baselines.statistics import TrainingStatistics


@dataclass(frozen=True, kw_only=True)
class PopularityConfig:
    """Nothing to set."""

    kind: str = "popularity"


class Popularity(CountingRecommender):
    """score(j) = training count of j; exact in float64."""

    def __init__(self, config: PopularityConfig, statistics: TrainingStatistics) -> None:
        self.num_items = statistics.num_items
        self.counts = torch.from_numpy(statistics.counts.astype("float64"))

    def scorer(self, batch: JaggedBatch) -> Scorer:
        size = batch.num_sequences
        return lambda span: self.counts[span[0] : span[1]].expand(size, -1)
