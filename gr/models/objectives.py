"""Objectives of a retrieval model: what is drawn before look-up, and the loss over the vectors that come back.

A config's ``negatives()`` tells the loader what to draw; its builder returns a function
``(model, query (S, D), vectors, batch) -> ()``: the losses of the positions, weighted by ``labels.weight`` and summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from gr import losses
from gr.config import Registry
from gr.data.batch import JaggedBatch
from gr.data.negatives import NegativesConfig
from gr.errors import UserError
from gr.modules.similarity import Similarity


class Scorer(Protocol):
    """What an objective may ask of a model."""

    num_items: int
    similarity: Similarity

    def full_softmax(self, query: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """() weighted sum of the cross-entropies of targets (S,) among all items, given queries (S, D)."""
        ...


ObjectiveFunction = Callable[[Scorer, Tensor, dict[str, Tensor], JaggedBatch], Tensor]


@dataclass(frozen=True, kw_only=True)
class FullSoftmaxConfig:
    """Cross-entropy over the whole catalogue: exact, and the cheapest there is below some 10,000 to 20,000 items."""

    kind: str = "full_softmax"

    def negatives(self) -> NegativesConfig:
        return NegativesConfig(kind="none")


@dataclass(frozen=True, kw_only=True)
class SampledSoftmaxConfig:
    """The paper's recipe for MovieLens by default: 128 uniform negatives for each position, no correction."""

    kind: str = "sampled_softmax"
    num_negatives: int = 128
    sampler: Literal["uniform", "popularity"] = "uniform"
    shared: bool = False
    """One draw for the whole global batch instead of one for each position."""
    correct: bool = False
    """Subtract log q (of any use only where q is not uniform)."""

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise UserError(f"num_negatives is {self.num_negatives}; it must be at least 1")

    def negatives(self) -> NegativesConfig:
        return NegativesConfig(kind=self.sampler, num=self.num_negatives, shared=self.shared)


@dataclass(frozen=True, kw_only=True)
class InBatchConfig:
    """The other labels of the global batch as negatives: de-duplicated, corrected by log q."""

    kind: str = "in_batch"
    correct: bool = True

    def negatives(self) -> NegativesConfig:
        return NegativesConfig(kind="in_batch", shared=True)


@dataclass(frozen=True, kw_only=True)
class BCEConfig:
    """Binary cross-entropy against uniform negatives, as SASRec was first trained."""

    kind: str = "bce"
    num_negatives: int = 1

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise UserError(f"num_negatives is {self.num_negatives}; it must be at least 1")

    def negatives(self) -> NegativesConfig:
        return NegativesConfig(kind="uniform", num=self.num_negatives, shared=False)


def _collision(batch: JaggedBatch) -> Tensor:
    """(S, R) bool: the negative is the position's own label."""
    assert batch.labels is not None and batch.negatives is not None
    return batch.labels.item_id.unsqueeze(1) == batch.negatives.ids


def _index(vectors: dict[str, Tensor], batch: JaggedBatch) -> Tensor | None:
    """(S, R) rows of the negative vectors where these are the whole catalogue's, else None."""
    assert batch.negatives is not None
    return batch.negatives.ids if vectors["negative"].dim() < batch.negatives.ids.dim() + 1 else None


def _full_softmax(cfg: FullSoftmaxConfig) -> ObjectiveFunction:
    def run(model: Scorer, query: Tensor, vectors: dict[str, Tensor], batch: JaggedBatch) -> Tensor:
        return model.full_softmax(query, batch.labels.item_id, batch.labels.weight)

    return run


def _sampled(cfg: SampledSoftmaxConfig | InBatchConfig) -> ObjectiveFunction:
    def run(model: Scorer, query: Tensor, vectors: dict[str, Tensor], batch: JaggedBatch) -> Tensor:
        drawn = batch.negatives
        each = losses.sampled_softmax(
            query,
            vectors["label"],
            vectors["negative"],
            scale=model.similarity.scale,
            collision=_collision(batch),
            index=_index(vectors, batch),
            log_q=drawn.log_q if cfg.correct else None,
            positive_log_q=drawn.positive_log_q if cfg.correct else None,
        )
        return (each * batch.labels.weight).sum()

    return run


def _bce(cfg: BCEConfig) -> ObjectiveFunction:
    def run(model: Scorer, query: Tensor, vectors: dict[str, Tensor], batch: JaggedBatch) -> Tensor:
        each = losses.binary_cross_entropy(
            query,
            vectors["label"],
            vectors["negative"],
            scale=model.similarity.scale,
            collision=_collision(batch),
            index=_index(vectors, batch),
        )
        return (each * batch.labels.weight).sum()

    return run


OBJECTIVES: Registry = {
    "full_softmax": (FullSoftmaxConfig, _full_softmax),
    "sampled_softmax": (SampledSoftmaxConfig, _sampled),
    "in_batch": (InBatchConfig, _sampled),
    "bce": (BCEConfig, _bce),
}
