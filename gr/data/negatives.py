"""Negatives, drawn before the look-up.

Draws are keyed by (seed, step, sample_key, which label of the row, which negative), shared ones by (seed,
step), so that they do not depend on how samples are dealt to ranks. ``log_q`` is the log of an item's
expected number of draws, for the correction of a sampled softmax; uniform draws need none, since the same
constant would leave every logit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from gr.data.batch import JaggedBatch, Negatives
from gr.data.random_keys import draws, keyed
from gr.data.split import Split, training_counts
from gr.data.store import EventStore
from gr.errors import UserError

_NEGATIVES = 0x6E656773  # keeps these draws apart from the shuffle's under one seed
_SHARED = -1  # stands where a sample key would
_BLOCK = 1 << 14  # draws at a time: they stay in the second-level cache, which halves the time
_LARGEST_TABLE = 1 << 24  # 128 MiB; above it popularity draws search the cumulative counts instead


@dataclass(frozen=True)
class NegativesConfig:
    """What the loader draws.

    Attributes:
        kind: ``uniform`` over the catalogue, ``popularity`` (training count + 1), ``in_batch`` (the distinct
            labels of the global batch) or ``none``.
        num: R, for the first two.
        shared: One draw of R for the whole global batch instead of one for each label; always so in_batch.
    """

    kind: Literal["none", "uniform", "popularity", "in_batch"] = "uniform"
    num: int = 128
    shared: bool = False

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"num is {self.num}; at least 1 negative must be drawn (kind 'none' draws none)")


class Sampler(Protocol):
    """Draws for one rank's part of a global batch."""

    def __call__(self, batch: JaggedBatch, seed: int, step: int, global_labels: Callable[[], np.ndarray]) -> Negatives:
        """Negatives of a batch.

        Args:
            batch: This rank's rows, with labels.
            seed: The run's seed.
            step: The optimizer step, or whatever numbers global batches.
            global_labels: Gives the label items of the whole global batch; only called when they matter.
        """
        ...


def make_sampler(config: NegativesConfig, store: EventStore, split: Split) -> Sampler | None:
    """The sampler of a config, fitted on training events only; ``None`` for kind ``none``."""
    if config.kind == "none":
        return None
    return SAMPLERS[config.kind](config, store, split)


@dataclass(frozen=True)
class Uniform:
    """Every item of the catalogue alike."""

    config: NegativesConfig
    num_items: int

    def __call__(self, batch: JaggedBatch, seed: int, step: int, global_labels: Callable[[], np.ndarray]) -> Negatives:
        words = label_keys(batch, seed, step, self.config.shared)
        ids = _draw(words, self.config, lambda block: draws(block, self.config.num, self.num_items))
        return Negatives(ids=torch.from_numpy(ids))


@dataclass(frozen=True)
class Popularity:
    """In proportion to training count + 1, so that every item can be drawn.

    Attributes:
        cumulative: (V,) int64 running sum of count + 1.
        table: (total,) int64, item of each unit of count, or ``None`` where that would be too large.
    """

    config: NegativesConfig
    cumulative: np.ndarray
    table: np.ndarray | None

    def __call__(self, batch: JaggedBatch, seed: int, step: int, global_labels: Callable[[], np.ndarray]) -> Negatives:
        words = label_keys(batch, seed, step, self.config.shared)
        ids = torch.from_numpy(_draw(words, self.config, self.items))
        return Negatives(ids, self.log_q[ids], self.log_q[batch.labels.item_id])

    def items(self, words: np.ndarray) -> np.ndarray:
        """(n, R) items for (n,) uint64 words; the same with and without the table."""
        unit = draws(words, self.config.num, int(self.cumulative[-1]))
        if self.table is not None:
            return self.table.take(unit)
        return np.searchsorted(self.cumulative, unit, side="right")

    @property
    def log_q(self) -> torch.Tensor:
        """(V,) float32 log of R times each item's probability."""
        return self._log_q

    def __post_init__(self) -> None:
        share = np.diff(self.cumulative, prepend=0) / self.cumulative[-1]
        object.__setattr__(self, "_log_q", torch.from_numpy(np.log(self.config.num * share).astype(np.float32)))


@dataclass(frozen=True)
class InBatch:
    """The distinct label items of the global batch, ascending; R varies from batch to batch.

    An item with share p of the training events is among n labels with probability 1 - (1 - p)^n, which is
    also its expected number of draws, since duplicates are removed.

    Attributes:
        counts: (V,) int64 training count of each item.
    """

    counts: np.ndarray

    def __call__(self, batch: JaggedBatch, seed: int, step: int, global_labels: Callable[[], np.ndarray]) -> Negatives:
        labels = global_labels()
        ids = np.unique(labels)
        own = batch.labels.item_id.numpy()
        return Negatives(torch.from_numpy(ids), self.log_q(ids, labels.size), self.log_q(own, labels.size))

    def log_q(self, ids: np.ndarray, num_labels: int) -> torch.Tensor:
        """Float32 log(1 - (1 - p)^n), by log1p and expm1: p may be 1e-9."""
        share = self.counts[ids] / self.counts.sum()
        with np.errstate(divide="ignore"):  # p = 1: the only item there is, log1p gives -inf and the result is 0
            return torch.from_numpy(np.log(-np.expm1(num_labels * np.log1p(-share))).astype(np.float32))


def label_keys(batch: JaggedBatch, seed: int, step: int, shared: bool = False) -> np.ndarray:
    """uint64 key of each label, (S,), from (seed, step, sample_key, ordinal of the label in its row); (1,) if
    shared."""
    if shared:
        return keyed(_NEGATIVES, seed, step, _SHARED)
    position = batch.labels.position.numpy()
    offsets = batch.offsets.numpy()
    row = np.searchsorted(offsets, position, side="right") - 1
    ordinal = np.arange(row.size) - np.searchsorted(row, row, side="left")
    rows = keyed(_NEGATIVES, seed, step, batch.rows["sample_key"].numpy())
    return keyed(rows[row], ordinal)


def _draw(words: np.ndarray, config: NegativesConfig, items: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(S, R) int64, or (R,) if shared: R items for each of (S,) words."""
    result = np.empty((words.size, config.num), np.int64)
    rows = max(1, _BLOCK // config.num)
    for lo in range(0, words.size, rows):
        result[lo : lo + rows] = items(words[lo : lo + rows])
    return result[0] if config.shared else result


def _uniform(config: NegativesConfig, store: EventStore, split: Split) -> Uniform:
    return Uniform(config, store.num_items)


def _popularity(config: NegativesConfig, store: EventStore, split: Split) -> Popularity:
    return popularity(config, training_counts(store, split))


def popularity(config: NegativesConfig, counts: np.ndarray) -> Popularity:
    """A popularity sampler over (V,) int64 training counts."""
    cumulative = np.cumsum(counts + 1, dtype=np.int64)
    small = cumulative[-1] <= _LARGEST_TABLE
    return Popularity(config, cumulative, np.repeat(np.arange(counts.size), counts + 1) if small else None)


def _in_batch(config: NegativesConfig, store: EventStore, split: Split) -> InBatch:
    return InBatch(training_counts(store, split))


SAMPLERS: dict[str, Callable[[NegativesConfig, EventStore, Split], Sampler]] = {
    "uniform": _uniform,
    "popularity": _popularity,
    "in_batch": _in_batch,
}
