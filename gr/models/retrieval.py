"""A retrieval model: tables -> preprocessor -> sequence encoder -> similarity with every item.

It knows nothing of parallelism. One look-up a step serves tokens, labels and negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gr import flops
from gr.config import OneOf, build, unhashed_default
from gr.data.batch import JaggedBatch
from gr.embedding.local import LocalTables
from gr.embedding.spec import TableSpec
from gr.errors import UserError
from gr.flops import StepCost
from gr.losses import Losses
from gr.models.objectives import OBJECTIVES
from gr.models.recommender import Ranked
from gr.modules.encoders import ENCODERS
from gr.modules.hstu import HSTUConfig
from gr.modules.preprocess import Preprocessor, PreprocessorConfig
from gr.modules.similarity import Similarity, SimilarityConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A retrieval model of width ``dim``.

    Attributes:
        item_rows: Rows of the item table, fewer than there are items, into which item ids are hashed; 0: each item has
            a row of its own. Items of one row have one vector, as inputs, labels and negatives alike: they get equal
            scores, so that the evaluation counts them as ties, and a negative that shares its label's row weighs as
            much as the label does, as in the full softmax.
    """

    dim: int = 64
    encoder: Annotated[Any, OneOf(ENCODERS, default="hstu")] = field(default_factory=HSTUConfig)
    preprocessor: PreprocessorConfig = field(default_factory=PreprocessorConfig)
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    table_init_std: float = 0.02
    item_rows: int = unhashed_default(0)

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"dim is {self.dim}; it must be at least 1")
        if self.item_rows < 0:
            raise UserError(f"item_rows is {self.item_rows}; it must be positive, or 0 for a row an item")
        if not 0 < self.table_init_std < math.inf:
            raise UserError(f"table_init_std is {self.table_init_std}; it must be positive")


def table_specs(cfg: ModelConfig, *, num_items: int, num_actions: int, layout: str) -> tuple[TableSpec, ...]:
    """The tables of a model of a log with so many items and kinds of action.

    Raises:
        UserError: Items are to be hashed into as many rows as there are items, or more.
    """
    if cfg.item_rows >= num_items:
        raise UserError(
            f"model.item_rows is {cfg.item_rows}, but there are {num_items} items, each of which may have a row of "
            "its own: leave it out"
        )
    hashed = {"hashed_ids": num_items} if cfg.item_rows else {}
    specs = [TableSpec("item", cfg.item_rows or num_items, cfg.dim, cfg.table_init_std, **hashed)]
    if layout != "items":
        specs.append(TableSpec("action", num_actions, cfg.dim, cfg.table_init_std))
    return tuple(specs)


class RetrievalModel(nn.Module):
    """Predicts the next item from a user's history.

    Args:
        cfg: The model.
        objective: Config of a registered objective.
        num_items: V.
        num_actions: Kinds of action; 0 where the layout does not use them.
        layout: ``items``, ``interleaved`` or ``added``.
        max_tokens: Longest row the layout writes.
        make_tables: Makes the tables of their specs.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        objective: Any,
        *,
        num_items: int,
        num_actions: int,
        layout: str,
        max_tokens: int,
        make_tables: Callable[[tuple[TableSpec, ...]], Any] = LocalTables,
    ) -> None:
        super().__init__()
        self.cfg, self.num_items, self.num_actions, self.layout = cfg, num_items, num_actions, layout
        self.tables = make_tables(table_specs(cfg, num_items=num_items, num_actions=num_actions, layout=layout))
        self.preprocessor = Preprocessor(cfg.preprocessor, cfg.dim, max_tokens, layout)
        self.encoder = build(ENCODERS, cfg.encoder, cfg.dim, max_tokens)
        self.similarity = Similarity(cfg.similarity)
        self._objective = build(OBJECTIVES, objective)

    def table_parameters(self) -> list[nn.Parameter]:
        """Parameters that belong to tables."""
        return list(self.tables.parameters())

    def dense_parameters(self) -> list[nn.Parameter]:
        """All others."""
        owned = {id(p) for p in self.table_parameters()}
        return [p for p in self.parameters() if id(p) not in owned]

    def blocks(self) -> list[nn.Module]:
        """Modules that run one after another and hold most of the dense parameters."""
        return list(getattr(self.encoder, "layers", ()))

    def encode(
        self, batch: JaggedBatch, extra: dict[str, Tensor] | None = None, full_softmax: tuple[str, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Output vectors (T, D), and the vectors of ``extra`` item ids from the same look-up."""
        wanted = {"token": batch.tokens["item_id"], **(extra or {})}
        flat = torch.cat([ids.reshape(-1) for ids in wanted.values()])
        request = {"item": flat}
        if self.layout != "items":
            request["action"] = batch.tokens["action"]
        looked_up = self.tables(request, full_softmax)
        parts = looked_up["item"].split([ids.numel() for ids in wanted.values()])
        vectors = {name: part.view(*ids.shape, -1) for (name, ids), part in zip(wanted.items(), parts, strict=True)}
        inputs = {"item": vectors.pop("token")}
        if "action" in looked_up:
            inputs["action"] = looked_up["action"]
        return self.encoder(self.preprocessor(inputs, batch), batch), vectors

    def logits(self, query: Tensor, item_range: tuple[int, int]) -> Tensor:
        """(S, hi - lo) scores of prepared queries (S, D) against items lo..hi-1."""
        # The scale goes into the (S, D) queries: over (S, V) scores it costs about a tenth of the softmax.
        return self.tables.logits(query * self.similarity.scale, "item", item_range, self.similarity.item)

    def full_softmax(self, query: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """() weighted sum of the cross-entropies of target items (S,) among all, given prepared queries (S, D)."""
        return self.tables.full_softmax(query * self.similarity.scale, "item", target, weight, self.similarity.item)

    def forward(self, batch: JaggedBatch) -> Losses:
        """One training step's losses over the batch's labels."""
        labels = batch.labels
        assert labels is not None, "a training batch has labels"
        extra = {}
        if batch.negatives is not None:
            drawn = batch.negatives.ids
            # More draws than items: every item is looked up (and normalised) once, and the draws index them.
            if drawn.dim() == 2 and drawn.numel() >= self.num_items:
                drawn = torch.arange(self.num_items, device=drawn.device)
            extra = {"label": labels.item_id, "negative": drawn}
        encoded, vectors = self.encode(batch, extra, () if extra else ("item",))
        query = self.similarity.query(encoded[labels.position])
        vectors = {name: self.similarity.item(vector) for name, vector in vectors.items()}
        total = self._objective(self, query, vectors, batch)
        return Losses(total=total, parts={"loss": total.detach()}, weight=labels.weight.sum())

    def step_cost(self, batch: JaggedBatch) -> StepCost:
        """Exact pairs and forward FLOPs of a training batch; call it before the batch leaves the host.

        Counted are the encoder's matrix products and the scores of the objective; look-ups cost no FLOPs.
        """
        pairs = self.encoder.pairs(batch)
        forward = sum(self.encoder.forward_flops(batch.num_tokens, pairs).values())
        if batch.labels is not None:
            supervised, dim = batch.labels.item_id.numel(), self.cfg.dim
            if batch.negatives is None:
                forward += flops.full_softmax_flops(supervised=supervised, dim=dim, num_items=self.num_items)
            else:
                drawn = batch.negatives.ids.shape[-1]
                forward += flops.sampled_softmax_flops(supervised=supervised, dim=dim, negatives=drawn)
        return StepCost(batch.num_tokens, pairs, forward)

    @torch.no_grad()
    def query(self, batch: JaggedBatch) -> Tensor:
        """(B, D) prepared query of each row's last token."""
        request = {"item": batch.tokens["item_id"]}
        if self.layout != "items":
            request["action"] = batch.tokens["action"]
        x = self.preprocessor(self.tables(request), batch)
        if hasattr(self.encoder, "last"):
            return self.similarity.query(self.encoder.last(x, batch))
        return self.similarity.query(self.encoder(x, batch)[batch.last_positions()])

    @torch.no_grad()
    def scorer(self, batch: JaggedBatch) -> Callable[[tuple[int, int]], Tensor]:
        """``item_range -> (B, hi - lo)`` scores; histories are encoded once, however many ranges are asked for."""
        query = self.query(batch)

        def score(item_range: tuple[int, int]) -> Tensor:
            with torch.no_grad():
                return self.logits(query, item_range)

        return score

    @property
    def item_rows(self) -> TableSpec | None:
        """The item table where items share rows, so that rows are what is scored; ``None``: each has its own."""
        spec = self.tables.specs["item"]
        return spec if spec.hashed_ids else None

    @torch.no_grad()
    def row_scorer(self, batch: JaggedBatch) -> Callable[[tuple[int, int]], Tensor]:
        """``row_range -> (B, hi - lo)`` scores of the item table's rows, once for all items of a row."""
        query = self.query(batch) * self.similarity.scale

        def score(row_range: tuple[int, int]) -> Tensor:
            with torch.no_grad():
                return self.tables.row_logits(query, "item", row_range, self.similarity.item)

        return score

    @torch.no_grad()
    def own_scorer(self) -> tuple[tuple[int, int], Callable[[Tensor, tuple[int, int]], Tensor]]:
        """With sharded tables: the item table's rows (lo, hi) that this process scores, and the function that does.

        A collective; the function is none: ``(queries (S, D) of any process, row_range within) -> (S, ...)`` scores.
        """
        lo, hi = self.tables.own_range("item")
        vectors = self.similarity.item(self.tables.own_vectors("item"))

        def score(query: Tensor, row_range: tuple[int, int]) -> Tensor:
            return (query * self.similarity.scale) @ vectors[row_range[0] - lo : row_range[1] - lo].T

        return (lo, hi), score

    @torch.no_grad()
    def scores(self, batch: JaggedBatch, item_range: tuple[int, int]) -> Tensor:
        """(B, hi - lo) scores of items lo..hi-1 for the event after each row's last token."""
        return self.logits(self.query(batch), item_range)

    @torch.no_grad()
    def recommend(self, batch: JaggedBatch, k: int, exclude: Tensor | None = None) -> Ranked:
        """The k best items for each row; ``exclude`` (B, V) bool are never shown."""
        scores = self.scores(batch, (0, self.num_items)).float()
        if exclude is not None:
            scores = scores.masked_fill(exclude, float("-inf"))
        best, items = scores.topk(min(k, self.num_items), dim=1)
        return Ranked(items=items.masked_fill(best == float("-inf"), -1), scores=best)
