"""Do events of one moment stand in an order that all users share? Then the order is the file's, not people's.

Logs dated to the day, or written in batches, list a user's events of one moment by product id or in another fixed
order. A stable sort keeps it, and a model learns it: its scores then rise for a reason that no service will see.
"""

from __future__ import annotations

import numpy as np

USERS = 20_000
"""Users looked at, the first by id: memory stays bounded, and the answer does not depend on how a log is cut."""
LEAST_SHARE = 0.05
LEAST_AGREEMENT = 0.75
LEAST_SEEN = 100
"""Observations of pairs that were seen twice or more; with fewer, agreement says little."""


class TieOrder:
    """Counts, part by part of a sorted log."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items
        self._events = 0
        self._tied = 0
        self._forward: list[np.ndarray] = []

    def add(self, user: np.ndarray, moment: np.ndarray, item: np.ndarray) -> None:
        """Some users' events in their final order: (n,) user, time (or position) and item, integers."""
        cut = int(np.searchsorted(user, USERS))
        user, moment, item = user[:cut], moment[:cut], item[:cut].astype(np.int64)
        tied = (np.diff(user) == 0) & (np.diff(moment) == 0)
        self._events += cut
        self._tied += int(tied.sum())
        first, second = item[:-1][tied], item[1:][tied]
        pair = np.minimum(first, second) * self._num_items + np.maximum(first, second)
        # A pair's two directions side by side: 2 * pair + direction.
        self._forward.append((2 * pair + (first < second))[first != second])

    def share(self) -> float:
        """Of events, how many have the same moment as the one before."""
        return self._tied / max(self._events, 1)

    def agreement(self) -> tuple[float, int]:
        """The chance that two sightings of the same two neighbours, tied, are in the same order, and the sightings it
        is made of. Orders drawn at random give one half, however few sightings a pair has."""
        code, count = np.unique(np.concatenate(self._forward or [np.zeros(0, np.int64)]), return_counts=True)
        pair, place = np.unique(code // 2, return_inverse=True)
        both = np.zeros((pair.size, 2))
        both[place, code % 2] = count
        seen = both.sum(1)
        twice = seen >= 2
        both, seen = both[twice], seen[twice]
        same = (both * (both - 1)).sum(1) / (seen * (seen - 1))
        return float((same * seen).sum() / max(seen.sum(), 1)), int(seen.sum())

    def caveat(self) -> str | None:
        """A sentence to print beside every number made from the log, if its order within ties is suspect."""
        if self.share() < LEAST_SHARE:
            return None
        agreement, seen = self.agreement()
        if seen < LEAST_SEEN or agreement < LEAST_AGREEMENT:
            return None
        return (
            f"{self.share():.0%} of events have the same time as the one before, and two such neighbours stand in the "
            f"same order in {agreement:.0%} of cases, whoever the user is (chance: 50%): a model can learn this order "
            "of the file, which tells nothing of people; data.ties: shuffled takes it away"
        )
