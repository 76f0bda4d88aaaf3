"""What all counting baselines share: reading histories, and the k best from block-wise scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.data.batch import JaggedBatch
from gr.models.recommender import Ranked

Scorer = Callable[[tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Histories:
    """The item tokens of a batch: ``offsets`` (B+1,) int64 and ``items`` (T',) int64, oldest first."""

    offsets: np.ndarray
    items: np.ndarray

    @property
    def row(self) -> np.ndarray:
        """(T',) int64 row of each item."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @property
    def steps_back(self) -> np.ndarray:
        """(T',) int64: 0 for a row's last item, 1 for the one before, ..."""
        return self.offsets[1:][self.row] - 1 - np.arange(len(self.items))


def histories(batch: JaggedBatch) -> Histories:
    """Reads item tokens (type 0); action tokens of an interleaved layout are left out."""
    items, offsets = batch.tokens["item_id"].cpu().numpy(), batch.offsets.cpu().numpy()
    if "token_type" in batch.index:
        keep = batch.index["token_type"].cpu().numpy() == 0
        offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
        items = items[keep]
    return Histories(offsets, items)


class CountingRecommender:
    """A Recommender (gr.models.recommender) from ``scorer``, which subclasses define."""

    num_items: int

    def scorer(self, batch: JaggedBatch) -> Scorer:
        """Reads the histories once; the result maps (lo, hi) to (B, hi - lo) float scores on the CPU."""
        raise TypeError(f"{type(self).__name__} must define scorer")

    def scores(self, batch: JaggedBatch, item_range: tuple[int, int]) -> Tensor:
        """(B, hi - lo) scores of items lo..hi-1 for the event after each history."""
        return self.scorer(batch)(item_range)

    def recommend(self, batch: JaggedBatch, k: int, exclude: Tensor | None = None) -> Ranked:
        """The k best items of each row; ties go to the lower index. ``exclude`` is (B, V) bool."""
        return top_k(self.scorer(batch), self.num_items, k, exclude)


def top_k(scorer: Scorer, num_items: int, k: int, exclude: Tensor | None = None, block: int = 65536) -> Ranked:
    """The k best of block-wise scores, merged block by block; item -1, score -inf where fewer remain."""
    best_scores = best_items = None
    for lo in range(0, num_items, block):
        hi = min(lo + block, num_items)
        values = scorer((lo, hi))
        items = torch.arange(lo, hi).expand(values.shape)
        if exclude is not None:
            hidden = exclude[:, lo:hi]
            values, items = values.masked_fill(hidden, -torch.inf), items.masked_fill(hidden, -1)
        if best_scores is not None:
            values, items = torch.cat([best_scores, values], dim=1), torch.cat([best_items, items], dim=1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
        best_scores, best_items = values.gather(1, order), items.gather(1, order)
    lacking = k - best_items.shape[1]
    if lacking > 0:
        best_items = torch.nn.functional.pad(best_items, (0, lacking), value=-1)
        best_scores = torch.nn.functional.pad(best_scores, (0, lacking), value=-torch.inf)
    return Ranked(best_items, best_scores)


def setting(config: Any) -> str:
    """A config in words, such as ``window 5, decay 0.7``; ``-`` when there is nothing to set."""
    parts = [f"{f.name.replace('_', ' ')} {getattr(config, f.name)}" for f in fields(config) if f.name != "kind"]
    return ", ".join(parts) or "-"
