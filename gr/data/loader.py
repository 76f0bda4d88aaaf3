"""Batches, resumable to the exact one, and for every number of ranks the same global ones.

(Two exceptions: a last batch with fewer users than ranks joins the one before it, and under a token budget a batch
holds at least one user a rank.)

An epoch's plan is a pure function of (seed, epoch): users in a keyed order, cut into *global* batches. Every
rank computes it and takes its part of each batch, dealt so that ranks carry like costs; the union over ranks
is the global batch. A loader has no state: a batch is asked for by (epoch, index), so a run resumes to the exact one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gr.data.batch import JaggedBatch
from gr.data.layout import (
    LayoutConfig,
    check_layout,
    evaluation_batch,
    training_batch,
    training_labels,
    training_ranges,
)
from gr.data.negatives import Sampler
from gr.data.random_keys import keyed
from gr.data.split import Split, Targets
from gr.data.store import EventStore
from gr.errors import UserError

_SHUFFLE = 0x73687566
# Query-key pairs that cost as much as one token. Matrix products alone say 2.5 D (linear layers take about 5 D^2
# multiply-adds a token, attention 2 D a pair): 160 at width 64, 2560 at 1024. But the rest done to a token waits for
# memory: on a CPU 730 were measured at width 64 (benchmarks.train.balance). Ranks need only be alike, so one number
# does for all: dealt by 1024, the dearest rank of Zipf and of uniform lengths is within 2 % of what the true number
# would give, be that 64 or 5000.
PAIRS_PER_TOKEN = 1024
EPOCH_STRIDE = 1 << 32


@dataclass(frozen=True)
class BatchingConfig:
    """Size of a global batch, all ranks together.

    Attributes:
        batch_size: Sequences; 0: by tokens.
        tokens_per_batch: Most tokens (a longer single row still makes a batch); 0: by sequences.
    """

    batch_size: int = 128
    tokens_per_batch: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 0 or self.tokens_per_batch < 0 or (self.batch_size > 0) == (self.tokens_per_batch > 0):
            raise UserError(
                f"batch_size {self.batch_size} and tokens_per_batch {self.tokens_per_batch}: "
                "exactly one of them must be positive and the other 0"
            )


class TrainLoader:
    """Training batches of one rank.

    Args:
        store: The log.
        split: Says which events train.
        layout: How events become tokens.
        batching: Size of the global batch.
        sampler: Draws negatives; ``None``: none.
        seed: The run's seed.
        rank: This process among ``world``.
        world: Number of processes.

    Attributes:
        users: (n,) int64 users with at least one label.

    Raises:
        UserError: Too few users or too small a batch for ``world``, or a layout the log does not fit.
    """

    def __init__(
        self,
        store: EventStore,
        split: Split,
        layout: LayoutConfig,
        batching: BatchingConfig,
        sampler: Sampler | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        check_layout(store, layout)
        self.store, self.split, self.layout, self.batching = store, split, layout, batching
        self.sampler, self.seed, self.rank, self.world = sampler, seed, rank, world
        self.users = np.flatnonzero(split.train_stop >= 2)
        if self.users.size < world:
            raise UserError(
                f"{self.users.size} users have 2 training events; {world} ranks need at least one user each"
            )
        if 0 < batching.batch_size < world:
            raise UserError(f"batch_size is {batching.batch_size}; it must be at least the number of ranks, {world}")
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Users of each global batch, in order: each user with a label once."""
        planned = self._planned
        if planned is None or planned[0] != epoch:
            order = self.users[np.argsort(keyed(_SHUFFLE, self.seed, epoch, self.users), kind="stable")]
            stops = self._stops(order)
            planned = epoch, [order[lo:hi] for lo, hi in zip([0, *stops[:-1]], stops, strict=True)]
            self._planned = planned  # one assignment: the trainer's prefetching thread may be here too
        return planned[1]

    def num_batches(self, epoch: int) -> int:
        """Global batches of an epoch, which is also each rank's number of batches."""
        if self.batching.batch_size:  # no need of the order
            return len(self._stops(self.users))
        return len(self.plan(epoch))

    def batch(self, epoch: int, index: int, step: int | None = None) -> JaggedBatch:
        """This rank's part of a global batch.

        Args:
            epoch: From 0.
            index: Within the epoch.
            step: Keys the negatives; ``None`` numbers the batch by (epoch, index).
        """
        everyone = self.plan(epoch)[index]
        batch = training_batch(self.store, self.split, self.layout, everyone[self.share(everyone)[self.rank]])
        if self.sampler is None:
            return batch
        key = epoch * EPOCH_STRIDE + index if step is None else step

        def global_labels() -> np.ndarray:
            return training_labels(self.store, self.split, self.layout, everyone)

        return batch.replace(negatives=self.sampler(batch, self.seed, key, global_labels))

    def share(self, users: np.ndarray) -> list[np.ndarray]:
        """Who of a global batch's users each rank takes: index arrays into them, alike in cost."""
        return deal(self.costs(users), self.world)

    def costs(self, users: np.ndarray) -> np.ndarray:
        """(n,) int64 cost of each user's row: causal pairs plus ``PAIRS_PER_TOKEN`` for each token."""
        tokens = self._tokens(users)
        return predicted_cost(tokens, tokens * (tokens + 1) // 2)

    def _tokens(self, users: np.ndarray) -> np.ndarray:
        start, stop = training_ranges(self.split, self.layout, users)
        return (stop - start) * self.layout.tokens_per_event

    def _stops(self, order: np.ndarray) -> list[int]:
        """Where each batch ends in ``order``; every batch has a user for each rank."""
        total, size, budget = order.size, self.batching.batch_size, self.batching.tokens_per_batch
        if size:
            stops = list(range(size, total, size))
        else:
            running = np.cumsum(self._tokens(order))
            stops, start, used = [], 0, 0
            while start < total:
                start = max(int(np.searchsorted(running, used + budget, side="right")), start + self.world)
                if start < total:
                    used = int(running[start - 1])
                    stops.append(start)
        if stops and total - stops[-1] < self.world:
            stops.pop()
        return [*stops, total]


def predicted_cost(tokens, pairs):
    """Cost of a training step, in pairs: integers, or arrays of them."""
    return pairs + PAIRS_PER_TOKEN * tokens


def deal(costs: np.ndarray, world: int) -> list[np.ndarray]:
    """Parts of (n,) costs for ``world`` ranks, alike in cost, none empty: longest first to the least loaded
    (LPT).

    Returns:
        ``world`` ascending index arrays that together are 0..n-1; the dearest is within 4/3 of the best
        possible (Graham 1969).
    """
    if world == 1:
        return [np.arange(costs.size)]
    assert costs.size >= world and (costs > 0).all()
    parts: list[list[int]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for place in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        parts[rank].append(place)
        heapq.heapreplace(loads, (load + int(costs[place]), rank))
    return [np.sort(np.array(part, np.int64)) for part in parts]


class EvalLoader:
    """Histories before targets, in fixed batches that do not depend on the number of ranks.

    Args:
        store: The log.
        targets: Held-out events.
        layout: How events become tokens.
        batch_size: Rows of a batch.
        rank: Takes batches rank, rank + world, ...
        world: Number of processes.
    """

    def __init__(
        self,
        store: EventStore,
        targets: Targets,
        layout: LayoutConfig,
        batch_size: int = 256,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        if batch_size < 1:
            raise UserError(f"evaluation batch_size is {batch_size}; it must be at least 1")
        check_layout(store, layout)
        self.store, self.targets, self.layout = store, targets, layout
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._starts())

    def __iter__(self) -> Iterator[tuple[np.ndarray, JaggedBatch]]:
        """Yields ((B,) int64 rows of ``targets``, their batch)."""
        for start in self._starts():
            rows = np.arange(start, min(start + self.batch_size, len(self.targets)))
            yield rows, evaluation_batch(self.store, self.targets, rows, self.layout)

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, len(self.targets), self.world * self.batch_size)
