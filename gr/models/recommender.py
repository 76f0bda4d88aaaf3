"""What evaluation and serving know of a model: items with scores, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gr.data.batch import JaggedBatch


@dataclass(frozen=True)
class Ranked:
    """Best items first.

    Attributes:
        items: (B, k) int64 dense item indices; -1 where fewer than k items remain.
        scores: (B, k) float, descending.
    """

    items: Tensor
    scores: Tensor


class Recommender(Protocol):
    """HSTU, SASRec, every baseline, and later beam search and re-rankers are all this."""

    num_items: int

    def recommend(self, batch: JaggedBatch, k: int, exclude: Tensor | None = None) -> Ranked:
        """The k best items for each row.

        Args:
            batch: Histories; each row's last token carries ``query_time`` where the log has times.
            k: How many.
            exclude: (B, V) bool, items not to be shown; ``None``: none.
        """
        ...

    def scores(self, batch: JaggedBatch, item_range: tuple[int, int]) -> Tensor:
        """(B, hi - lo) scores of items lo..hi-1 for the event after each row's last token (optional)."""
        ...
