"""What baselines count, over training events only; shared by every setting of a grid."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from gr.data.split import Split, training_counts, training_items, user_blocks
from gr.data.store import EventStore


class TrainingStatistics:
    """Counts over each user's first ``split.train_stop[u]`` events, which are read in blocks and not kept.

    Args:
        store: The log.
        split: Says which events train.

    Attributes:
        num_items: V.
        counts: (V,) int64.
        popularity_level: (V,) int64, 0 for the least frequent; items with equal counts share a level.
    """

    def __init__(self, store: EventStore, split: Split) -> None:
        self.store, self.split = store, split
        self.num_items = int(store.num_items)
        self.counts = training_counts(store, split)
        self.popularity_level = np.unique(self.counts, return_inverse=True)[1].astype(np.int64)
        self._pairs: dict[int, sparse.csr_array] = {}

    def pairs(self, distance: int) -> sparse.csr_array:
        """(V, V) float32 CSR: how often j stands ``distance`` events after i in one user's training events.

        An entry for each pair that occurs. Counts below 2**24 are exact.
        """
        if distance not in self._pairs:
            parts: list[sparse.csr_array] = []
            # A sum costs V besides its entries, so blocks are larger than that.
            for first, end in user_blocks(self.store, 4 * self.num_items):
                part = self._block(distance, first, end)
                # Like sizes are added up, so that an entry takes part in a number of sums that is logarithmic.
                while parts and parts[-1].nnz <= 2 * part.nnz:
                    part = parts.pop() + part
                parts.append(part)
            self._pairs[distance] = sum(parts[1:], start=parts[0])
        return self._pairs[distance]

    def _block(self, distance: int, first: int, end: int) -> sparse.csr_array:
        items = training_items(self.store, self.split, first, end).astype(np.int32)
        user = np.repeat(np.arange(end - first, dtype=np.int32), self.split.train_stop[first:end])
        same = user[distance:] == user[: max(0, len(user) - distance)]
        before, after = items[: len(same)][same], items[distance:][same]
        ones = np.ones(len(before), dtype=np.float32)
        shape = (self.num_items, self.num_items)
        return sparse.coo_array((ones, (before, after)), shape=shape).tocsr()  # sums repeats
