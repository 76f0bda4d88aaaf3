"""First-order Markov chain: what followed the last item, backing off to popularity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gr.data.batch import JaggedBatch
from gr.errors import UserError
from gr.evaluation.baselines.base import CountingRecommender, Scorer, histories
from gr.evaluation.baselines.statistics import TrainingStatistics


@dataclass(frozen=True, kw_only=True)
class MarkovConfig:
    """``backoff``: how many transitions the popularity prior is worth (Dirichlet smoothing)."""

    kind: str = "markov"
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.backoff <= 0:
            raise UserError(f"Markov baseline: backoff is {self.backoff}; it must be positive")


class Markov(CountingRecommender):
    """score(j) = (n(i -> j) + backoff * p(j)) / (n(i) + backoff), i the last item, p popularity."""

    def __init__(self, config: MarkovConfig, statistics: TrainingStatistics) -> None:
        self.num_items = statistics.num_items
        self.backoff = config.backoff
        self.follow = statistics.pairs(1)
        self.out = np.asarray(self.follow.sum(axis=1), dtype=np.float64).ravel()
        self.popularity = statistics.counts / max(1, statistics.counts.sum())

    def scorer(self, batch: JaggedBatch) -> Scorer:
        history = histories(batch)
        known = np.flatnonzero(np.diff(history.offsets))
        last = history.items[history.offsets[1:][known] - 1]
        follow = self.follow[last].tocsc()  # columns are cut without a scan
        total = self.out[last][:, None]

        def score(span: tuple[int, int]) -> torch.Tensor:
            prior = self.backoff * self.popularity[span[0] : span[1]]
            # Popularity alone where a history is empty.
            values = np.tile(prior / self.backoff, (len(history.offsets) - 1, 1))
            values[known] = (follow[:, span[0] : span[1]].toarray() + prior) / (total + self.backoff)
            return torch.from_numpy(values)

        return score
