"""What baselines count, over training events only; shared by every setting of a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse


class TrainingStatistics:
    """Counts over each user's first ``split.train_stop[u]`` events.

    Args:
        store: The log: ``offsets`` (U+1,), ``columns["item_id"]`` (E,), ``num_items``.
        split: ``train_stop`` (U,) int64.

    Attributes:
        num_items: V.
        items: (E',) int32 items of the training events, users one after another.
        user: (E',) int32 their users.
        counts: (V,) int64.
        popularity_level: (V,) int64, 0 for the least frequent; items with equal counts share a level.
    """

    def __init__(self, store: Any, split: Any) -> None:
        offsets = np.asarray(store.offsets)
        user = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
        train = np.arange(len(user)) - offsets[user] < np.asarray(split.train_stop)[user]
        self.num_items = int(store.num_items)
        self.items = np.asarray(store.columns["item_id"])[train].astype(np.int32)
        self.user = user[train]
        self.counts = np.bincount(self.items, minlength=self.num_items)
        self.popularity_level = np.unique(self.counts, return_inverse=True)[1].astype(np.int64)
        self._pairs: dict[int, sparse.csr_array] = {}

    def pairs(self, distance: int) -> sparse.csr_array:
        """(V, V) float32 CSR: how often j stands ``distance`` events after i in one user's training events.

        At most E' entries, whatever V is. Counts below 2**24 are exact.
        """
        if distance not in self._pairs:
            same = self.user[distance:] == self.user[: max(0, len(self.user) - distance)]
            before, after = self.items[: len(same)][same], self.items[distance:][same]
            shape = (self.num_items, self.num_items)
            ones = np.ones(len(before), dtype=np.float32)
            pairs = sparse.coo_array((ones, (before, after)), shape=shape)
            self._pairs[distance] = pairs.tocsr()  # sums repeats
        return self._pairs[distance]
