"""Embedding tables in one process's memory: the specification that sharded tables are tested against.

Tables are asked for ids once a step (tokens, labels and negatives together) and hand out vectors. Nobody else touches
their weights: full softmax and evaluation go through ``full_softmax``, ``logits`` and ``iter_vectors``, which a
sharded table answers shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gr.embedding.config import TablesConfig
from gr.embedding.draw import draw
from gr.embedding.spec import TableSpec
from gr.embedding.update import new_sums, update
from gr.kernels.full_softmax import full_softmax_loss

Transform = Callable[[Tensor], Tensor]


class LocalTables(nn.Module):
    """Dense tables under ordinary autograd.

    fp16 rows are kept here as float32 numbers that fp16 holds exactly, so that their gradients are float32; a
    checkpoint holds them as fp16.

    Args:
        specs: The tables.
        config: Precision and update rule.
    """

    sharded = False

    def __init__(self, specs: tuple[TableSpec, ...], config: TablesConfig | None = None) -> None:
        super().__init__()
        self.config = config or TablesConfig()
        self.specs = {spec.name: spec for spec in specs}
        self.weights = nn.ParameterDict()
        for spec in specs:
            self.weights[spec.name] = nn.Parameter(self._rounded(draw(spec)(0, spec.num_rows)))
        # Buffers, so that they follow the module to its device; not in its state dict, for they are an optimizer's.
        self._sums = nn.Module()
        for spec in specs:
            self._sums.register_buffer(spec.name, new_sums(self.config.optimizer.kind, spec), persistent=False)
        self._lr_factor = 1.0

    @property
    def own_optimizer(self) -> bool:
        """Whether ``update`` changes the rows, rather than the dense parameters' optimizer."""
        return self.config.own_optimizer

    @property
    def num_parameters(self) -> int:
        """Numbers in all tables, over all processes."""
        return sum(spec.num_rows * spec.dim for spec in self.specs.values())

    def forward(self, ids: Mapping[str, Tensor], full_softmax: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Vectors of ids: table name -> int64 ids of any shape (...,) gives (..., dim).

        Args:
            ids: What is wanted.
            full_softmax: Tables of which ``full_softmax`` will be asked before the next look-up. Sharded tables want to
                know, for they then look up their own rows in the same pass.
        """
        return {
            name: nn.functional.embedding(self.specs[name].rows_of(wanted), self.weights[name])
            for name, wanted in ids.items()
        }

    def logits(self, query: Tensor, table: str, item_range: tuple[int, int], transform: Transform) -> Tensor:
        """(S, hi - lo) inner products of queries (S, dim) with the transformed vectors of a table's ids lo..hi-1."""
        rows, place = self.specs[table].distinct_rows(*item_range)
        if place is None:
            return self.row_logits(query, table, item_range, transform)
        return (query @ transform(self.weights[table][rows.to(query.device)]).T)[:, place.to(query.device)]

    def row_logits(self, query: Tensor, table: str, row_range: tuple[int, int], transform: Transform) -> Tensor:
        """(S, hi - lo) inner products of queries (S, dim) with the transformed rows lo..hi-1 of a table."""
        lo, hi = row_range
        return query @ transform(self.weights[table][lo:hi]).T

    def full_softmax(self, query: Tensor, table: str, target: Tensor, weight: Tensor, transform: Transform) -> Tensor:
        """() weighted sum of the cross-entropies of targets (S,) among all ids' transformed vectors."""
        vectors, spec = self.weights[table], self.specs[table]
        if spec.hashed_ids:
            vectors = vectors[spec.rows_of(torch.arange(spec.num_ids, device=vectors.device))]
        return full_softmax_loss(query, transform(vectors).to(query.dtype), target, weight)

    def iter_vectors(self, table: str, block: int = 65_536) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, (rows, dim) vectors) over a whole table."""
        weight = self.weights[table]
        for lo in range(0, weight.shape[0], block):
            yield lo, weight[lo : lo + block]

    # The optimizer of tables that own it ----------------------------------------------------------------------

    def set_lr_factor(self, factor: float) -> None:
        """The schedule's factor for the coming step; call it before the gradients are made."""
        self._lr_factor = factor

    def update(self) -> None:
        """Applies the gradients (fused optimizers have done so by now) and forgets them."""
        cfg = self.config
        for name, weight in self.weights.items():
            if weight.grad is not None:
                lr = cfg.optimizer.lr * self._lr_factor
                update(weight, weight.grad, getattr(self._sums, name), cfg.optimizer, lr)
                if cfg.rows == "fp16":
                    weight.data.copy_(self._rounded(weight.data))
                weight.grad = None

    def saved(self, sums: bool = True) -> dict[str, Tensor]:
        """What a checkpoint holds of the tables: ``<table>/rows``, and ``<table>/sums`` where they are wanted and are.

        The tensors are the tables' own where the dtype allows it; ``restored`` must be called after they were written.
        """
        dtype = torch.float16 if self.config.rows == "fp16" else torch.float32
        found = {f"{name}/rows": weight.detach().to(dtype) for name, weight in self.weights.items()}
        for name in self.specs if sums else ():
            if getattr(self._sums, name) is not None:
                found[f"{name}/sums"] = getattr(self._sums, name)
        return found

    @torch.no_grad()
    def restored(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what was written into the tensors of ``saved()``."""
        for name, weight in self.weights.items():
            weight.copy_(saved[f"{name}/rows"])

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight.half().float() if self.config.rows == "fp16" else weight
