"""The paper's HSTU in padded tensors and plain autograd: what our training is timed against.

The same model as :class:`gr.models.retrieval.RetrievalModel` with the ``paper`` preset, items only, cosine similarity
and sampled softmax, written as its definition reads (arXiv 2402.17152, section 3.2, and its public research code):
every sequence padded to the longest of its batch, one GEMM a projection, batched matrix products, no loop over users,
the fastest plain look-up (``index_select`` for bias tables, ``embedding`` for vectors: their backward differs),
in-place additions where autograd permits.

There are three of it, ``FORMS``, all the same function:

- ``plain``: time buckets in every layer and every gathered negative normalised, as the paper's public code has it.
- ``plain_lean``: buckets once a batch, the item table normalised once a step; a position's draws are still gathered
  and multiplied one position at a time.
- ``plain_gemm``: lean, and the scores of some positions against the whole catalogue in one GEMM, from which the draws
  are picked: what a small catalogue allows, and the strongest padded form we know.

It takes our batches, our initial weights and our optimizer (``table_parameters`` and ``dense_parameters`` are those of
our model), and returns our :class:`gr.losses.Losses`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.data.batch import JaggedBatch
from gr.data.loader import EvalLoader
from gr.errors import UserError
from gr.losses import Losses
from gr.models.retrieval import RetrievalModel
from gr.modules.hstu import HSTU

BUCKET_WIDTH = 0.301  # of the natural logarithm
LAYER_NORM_EPS = 1e-6
NORM_EPS = 1e-6
COLLISION_LOGIT = -5e4
FORMS = ("plain", "plain_lean", "plain_gemm")
GEMM_POSITIONS = 2048  # scores of so many positions against the catalogue at a time: larger ones cost page faults
# Choices of HSTUConfig that the plain form has built in.
BUILT_IN = {
    "window": None,
    "causal": True,
    "input_norm_affine": False,
    "uvqk_bias": False,
    "activated": "uvqk",
    "alpha": 1.0,
    "position_bias": True,
    "time_bias": True,
    "position_ids": "index",
    "output_norm": "layer",
    "output_norm_affine": False,
    "gate_activation": "none",
    "concat": "none",
    "output_bias": True,
}


class PlainLayer(nn.Module):
    """``x + f2(U * Norm(AV))`` over ``(B, N, D)``."""

    def __init__(self, dim: int, heads: int, dim_qk: int, dim_v: int, max_tokens: int, buckets: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.splits = (heads * dim_v, heads * dim_v, heads * dim_qk, heads * dim_qk)  # U, V, Q, K
        self.uvqk = nn.Linear(dim, sum(self.splits), bias=False)
        self.out = nn.Linear(heads * dim_v, dim)
        self.position_table = nn.Parameter(torch.empty(2 * max_tokens - 1))
        self.time_table = nn.Parameter(torch.empty(buckets))

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """``bias`` (B, N, N) is added to every head's scores; ``mask`` (N, N) is 1 / divisor where a key is seen."""
        u, v, q, k = F.silu(self.uvqk(F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS))).split(self.splits, dim=-1)
        v, q, k = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (v, q, k))
        scores = (q @ k.transpose(2, 3)).add_(bias[:, None])
        av = (F.silu(scores).mul_(mask) @ v).transpose(1, 2).flatten(2)
        y = u * F.layer_norm(av, av.shape[-1:], eps=LAYER_NORM_EPS)
        return x + self.out(F.dropout(y, self.dropout, self.training))

    def bias(self, distances: Tensor, buckets: Tensor) -> Tensor:
        """(B, N, N) from (N, N) rows of the position table and (B, N, N) rows of the time table."""
        position = self.position_table.index_select(0, distances.view(-1)).view(distances.shape)
        return self.time_table.index_select(0, buckets.view(-1)).view(buckets.shape).add_(position)


class PlainHSTU(nn.Module):
    """The padded model with the weights of one of ours.

    Args:
        ours: A model that this form can express; its weights are copied.
        form: One of ``FORMS``.

    Raises:
        UserError: The model makes a choice that this form does not know.
    """

    def __init__(self, ours: RetrievalModel, form: str = "plain") -> None:
        super().__init__()
        assert form in FORMS, form
        _check(ours)
        config, max_tokens, dim = ours.encoder.config, ours.encoder.max_tokens, ours.cfg.dim
        self.form, self.divisor, self.max_tokens = form, config.divisor, max_tokens
        self.num_items, self.num_buckets = ours.num_items, config.num_time_buckets
        self.input_scale, self.dropout = ours.preprocessor.scale, ours.preprocessor.config.dropout
        self.temperature = ours.cfg.similarity.temperature
        self.items = nn.Parameter(torch.empty(ours.num_items, dim))
        self.positions = nn.Parameter(torch.empty(max_tokens, dim))
        shape = (dim, config.num_heads, config.dim_qk, config.dim_v, max_tokens, config.num_time_buckets)
        self.layers = nn.ModuleList(PlainLayer(*shape, config.dropout) for _ in range(config.num_layers))
        self.to(dtype=next(ours.parameters()).dtype)
        with torch.no_grad():
            for _, source, target in pairs(ours, self):
                target.copy_(source)

    def table_parameters(self) -> list[nn.Parameter]:
        """As of our model."""
        return [self.items]

    def dense_parameters(self) -> list[nn.Parameter]:
        """As of our model."""
        return [p for p in self.parameters() if p is not self.items]

    def encode(self, batch: JaggedBatch, items: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(B * N, D)``, padding included, and the place ``(T,)`` of each jagged token among them."""
        num, width = batch.num_sequences, batch.max_seq_len
        row = torch.arange(num).repeat_interleave(batch.offsets.diff(), output_size=batch.num_tokens)
        slots = torch.arange(batch.num_tokens) - batch.offsets[row] + row * width
        asked, given = (_pad(batch.tokens[name], slots, num, width) for name in ("query_time", "timestamp"))
        ids = _pad(batch.tokens["item_id"], slots, num, width)

        x = F.embedding(ids, items) * self.input_scale + self.positions[:width]
        x = F.dropout(x, self.dropout, self.training)
        index = torch.arange(width)
        distances = index[None, :] - index[:, None] + self.max_tokens - 1
        mask = torch.ones(width, width, dtype=items.dtype).tril_().div_(self.divisor)
        buckets = self._buckets(asked, given) if self.form != "plain" else None
        for layer in self.layers:
            bias = layer.bias(distances, self._buckets(asked, given) if buckets is None else buckets)
            x = layer(x, bias, mask)
        return x.flatten(0, 1), slots

    def forward(self, batch: JaggedBatch) -> Losses:
        """One training step's losses, at the labels only."""
        labels, negatives = batch.labels, batch.negatives.ids
        encoded, slots = self.encode(batch, self.items)
        query = _unit(encoded.index_select(0, slots[labels.position]))
        unit = _unit(self.items) if self.form != "plain" else None
        label = _unit(F.embedding(labels.item_id, self.items)) if unit is None else F.embedding(labels.item_id, unit)
        own = (query * label).sum(-1, keepdim=True)
        if self.form == "plain_gemm":
            parts = zip(query.split(GEMM_POSITIONS), negatives.split(GEMM_POSITIONS), strict=True)
            drawn = torch.cat([(part @ unit.T).gather(1, ids) for part, ids in parts])
        else:
            others = _unit(F.embedding(negatives, self.items)) if unit is None else F.embedding(negatives, unit)
            drawn = torch.bmm(others, query.unsqueeze(2)).squeeze(2)
        logits = torch.cat([own, drawn], dim=1).div_(self.temperature)
        collision = F.pad(negatives == labels.item_id[:, None], (1, 0))
        each = torch.logsumexp(logits.masked_fill_(collision, COLLISION_LOGIT), dim=1) - logits[:, 0]
        total = (each * labels.weight).sum()
        return Losses(total=total, parts={"loss": total.detach()}, weight=labels.weight.sum())

    @torch.no_grad()
    def scores(self, batch: JaggedBatch, unit_items: Tensor) -> Tensor:
        """(B, V) cosines (over the temperature no rank changes) of each row's last token with the normalised table."""
        encoded, slots = self.encode(batch, self.items)
        return _unit(encoded.index_select(0, slots[batch.last_positions()])) @ unit_items.T

    def _buckets(self, asked: Tensor, given: Tensor) -> Tensor:
        """(B, N, N) int64 ``clamp(floor(ln(max(|t_{i+1} - t_j|, 1)) / 0.301), 0, K - 1)``."""
        seconds = (asked[:, :, None] - given[:, None, :]).abs_().clamp_(min=1)
        return seconds.to(self.items.dtype).log_().div_(BUCKET_WIDTH).long().clamp_(max=self.num_buckets - 1)


def rank_padded(model: PlainHSTU, loader: EvalLoader, mask_seen: bool, by_count: bool = False) -> np.ndarray:
    """Full-corpus ranks of a loader's targets: (n,) int64, 1 is best.

    Args:
        model: In evaluation mode.
        loader: As of :func:`gr.evaluation.ranking.rank_targets`.
        mask_seen: Whether earlier items of a user leave the candidates.
        by_count: Count the better scores; otherwise sort all of them, as the paper's code does.
    """
    store, targets = loader.store, loader.targets
    items = torch.from_numpy(np.array(store.columns["item_id"]))  # mapped columns cannot be written to
    start, count = (torch.from_numpy(a) for a in (np.asarray(store.offsets)[targets.user], targets.position))
    ranks = np.empty(len(targets), np.int64)
    with torch.no_grad():
        unit = _unit(model.items)
        for rows, batch in loader:
            scores = model.scores(batch, unit)
            if mask_seen:
                first, num = start[rows], count[rows]
                row = torch.arange(len(rows)).repeat_interleave(num)
                event = torch.arange(len(row)) + (first - num.cumsum(0) + num)[row]
                scores[row, items[event]] = float("-inf")
            truth = batch.labels.item_id[:, None]
            if by_count:
                better = (scores > scores.gather(1, truth)).sum(1)
            else:
                better = (scores.argsort(dim=1, descending=True) == truth).int().argmax(1)
            ranks[rows] = better.numpy() + 1
    return ranks


def pairs(ours: RetrievalModel, plain: PlainHSTU) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yields (our name, our parameter, the plain one) of every parameter."""
    named = {"tables.weights.item": plain.items, "preprocessor.position": plain.positions}
    for number, layer in enumerate(plain.layers):
        named |= {f"encoder.layers.{number}.{name}": parameter for name, parameter in layer.named_parameters()}
    found = dict(ours.named_parameters())
    assert found.keys() == named.keys(), f"not in both: {sorted(found.keys() ^ named.keys())}"
    for name, parameter in found.items():
        yield name, parameter, named[name]


def _check(ours: RetrievalModel) -> None:
    """Refuses what the plain form does not have."""
    if not isinstance(ours.encoder, HSTU) or ours.layout != "items":
        raise UserError("the plain form is of an HSTU encoder over layout 'items' only")
    wrong = {name: getattr(ours.encoder.config, name) for name in BUILT_IN}
    wrong = {name: value for name, value in wrong.items() if value != BUILT_IN[name]}
    if wrong or not isinstance(ours.encoder.config.divisor, float):
        raise UserError(
            f"the plain form has the paper's encoder with a number as divisor, not {wrong or 'this divisor'}"
        )
    if ours.cfg.similarity.kind != "cosine" or ours.preprocessor.position is None:
        raise UserError("the plain form has cosine similarity and absolute positions")


def _pad(values: Tensor, slots: Tensor, num: int, width: int) -> Tensor:
    """(T,) -> (num, width), zeros where there is no token."""
    return values.new_zeros(num * width).index_copy_(0, slots, values).view(num, width)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=NORM_EPS)
