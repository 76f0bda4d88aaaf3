"""The softmax Transformer encoder: SASRec as the HSTU reference has it, and a plain pre-norm one.

Both share the model's trunk with HSTU (tables, preprocessor, similarity, objective), so that a comparison of
the two is a comparison of encoders. Jagged in, jagged out; padded inside, a group of rows at a time, for
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr import flops
from gr.config import runtime
from gr.errors import UserError
from gr.kernels.hstu_attention import Mask, visible_pairs
from gr.modules.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A causal softmax Transformer.

    Attributes:
        num_layers: Blocks of attention and feed-forward.
        num_heads: Must divide the model width.
        ffn_dim: Hidden width of the feed-forward part; None is the model width, as in SASRec.
        dropout: On attention probabilities and twice in the feed-forward part.
        activation: Of the feed-forward part.
        block: "sasrec": the query alone is normalised (without weight and bias), the residuals start from the
            normalised vectors, and weights start as in the HSTU reference's SASRec; "pre_norm": the usual
            ``x + f(norm(x))`` with affine norms.
        final_norm: A last LayerNorm over the output.
        norm_eps: Of every LayerNorm.
        activation_checkpointing: Layers run again in the backward pass instead of keeping what they computed.
    """

    kind: str = "transformer"
    num_layers: int = 2
    num_heads: int = 1
    ffn_dim: int | None = None
    dropout: float = 0.2
    activation: Literal["relu", "gelu"] = "relu"
    block: Literal["sasrec", "pre_norm"] = "sasrec"
    final_norm: bool = False
    norm_eps: float = 1e-8
    activation_checkpointing: bool = runtime(False)

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"encoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise UserError(f"encoder.ffn_dim must be at least 1, or null for the model width, got {self.ffn_dim}")
        if not self.norm_eps > 0:
            raise UserError(f"encoder.norm_eps must be positive, got {self.norm_eps}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"encoder.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class _Group:
    """Some rows of a batch in padded form: where their tokens lie in it, and which pairs are seen."""

    lengths: Tensor  # (b,) int64
    width: int
    slots: Tensor  # (t,) int64
    mask: Tensor | None  # (b, 1, width, width) bool; None: causal

    def pad(self, x: Tensor) -> Tensor:
        rows = self.lengths.shape[0]
        padded = x.new_zeros((rows * self.width, *x.shape[1:]))
        return padded.index_copy(0, self.slots, x).view(rows, self.width, *x.shape[1:])

    def last_mask(self) -> Tensor:
        """``(b, 1, 1, width)`` bool, the keys that each row's last token sees."""
        if self.mask is None:
            return (torch.arange(self.width, device=self.lengths.device) < self.lengths[:, None])[:, None, None]
        return self.mask.take_along_dim((self.lengths - 1)[:, None, None, None], dim=2)


@dataclass(frozen=True)
class _Padding:
    """A batch dealt into groups of rows, one dealing for all layers.

    Attributes:
        groups: In the order of ``rows``.
        rows: (B,) int64, the batch's rows in the order of the groups; None: as they are.
        tokens: (T,) int64, their tokens in that order; None: as they are.
    """

    groups: tuple[_Group, ...]
    rows: Tensor | None = None
    tokens: Tensor | None = None


SHORTEST = 0.75
"""Of the longest row of a group: what the shortest may have, so that at most 7/16 of a group's pairs are padding."""


def _padding(batch: Any, num_tokens: int) -> _Padding:
    """On a CPU rows of nearly one length are padded together; elsewhere lengths are not known without waiting for the
    device, and all rows are padded to the longest."""
    offsets = batch.offsets
    lengths = offsets.diff()
    counts = (batch.rows.get("num_targets"), batch.rows.get("num_contextual"))
    if lengths.device.type != "cpu" or lengths.shape[0] == 0:
        return _Padding((_group(lengths, counts, max(batch.max_seq_len, 1), num_tokens),))
    rows = lengths.argsort(descending=True, stable=True)
    longest_first = lengths[rows]
    starts = longest_first.cumsum(0) - longest_first
    shift = (offsets[:-1][rows] - starts).repeat_interleave(longest_first, output_size=num_tokens)
    groups, begin, sizes = [], 0, longest_first.tolist()
    while begin < len(sizes):
        end = next((i for i in range(begin, len(sizes)) if sizes[i] < SHORTEST * sizes[begin]), len(sizes))
        mine = rows[begin:end]
        of_rows = tuple(None if count is None else count[mine] for count in counts)
        groups.append(_group(longest_first[begin:end], of_rows, max(sizes[begin], 1), sum(sizes[begin:end])))
        begin = end
    return _Padding(tuple(groups), rows, torch.arange(num_tokens) + shift)


def _group(lengths: Tensor, counts: tuple[Tensor | None, Tensor | None], width: int, num_tokens: int) -> _Group:
    device, rows = lengths.device, lengths.shape[0]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    shift = torch.arange(rows, device=device) * width - offsets[:-1]
    slots = torch.arange(num_tokens, device=device) + shift.repeat_interleave(lengths, output_size=num_tokens)
    targets, contextual = counts
    if targets is None and contextual is None:
        return _Group(lengths, width, slots, None)
    seen = visible_pairs(Mask(num_targets=targets, num_contextual=contextual), offsets, max_seq_len=width)
    # A softmax over nothing is NaN: padding queries see themselves, and nobody reads them.
    mask = torch.eye(width, dtype=torch.bool, device=device).repeat(rows, 1, 1)
    mask[:, : seen.shape[1], : seen.shape[2]] |= seen
    return _Group(lengths, width, slots, mask[:, None])


class TransformerBlock(nn.Module):
    """Attention and feed-forward with residuals."""

    def __init__(self, config: TransformerConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.ffn_dim or dim
        sasrec = config.block == "sasrec"
        self.attention_norm = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=not sasrec)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=not sasrec)
        self.ffn_in = nn.Linear(dim, hidden)
        self.ffn_out = nn.Linear(hidden, dim)
        for linear in (self.query, self.key_value, self.out, self.ffn_in, self.ffn_out):
            nn.init.xavier_normal_(linear.weight)
            if not (sasrec and linear in (self.ffn_in, self.ffn_out)):  # there: torch's own bias
                nn.init.zeros_(linear.bias)
        if sasrec:  # the reference initialises Q, K and V as one (3D, D) matrix
            for linear in (self.query, self.key_value):
                nn.init.normal_(linear.weight, std=(2.0 / (4 * dim)) ** 0.5)

    def forward(self, x: Tensor, padding: _Padding, last: Tensor | None = None) -> Tensor:
        """``(T, D)`` -> ``(T, D)``, or ``(B, D)`` if only the tokens ``last`` (B,), the last of each row, are wanted.

        All tokens are keys and values either way.
        """
        normed = self.attention_norm(x)
        # SASRec's keys and values come from the raw vectors, and its residual from the normalised ones.
        sasrec = self.config.block == "sasrec"
        memory = x if sasrec else normed
        if last is not None:
            normed, x = normed.index_select(0, last), x.index_select(0, last)
        x = (normed if sasrec else x) + self._attention(normed, memory, padding, last is not None)
        normed = self.ffn_norm(x)
        hidden = self.ffn_in(normed)
        hidden = F.relu(hidden) if self.config.activation == "relu" else F.gelu(hidden)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        update = F.dropout(self.ffn_out(hidden), self.config.dropout, self.training)
        return (normed if sasrec else x) + update

    def _attention(self, query: Tensor, memory: Tensor, padding: _Padding, last: bool) -> Tensor:
        heads, width = self.config.num_heads, query.shape[1]
        q, k, v = (
            part.view(-1, heads, width // heads)
            for part in (self.query(query), *self.key_value(memory).split(width, dim=1))
        )
        order = padding.rows if last else padding.tokens
        if padding.tokens is not None:
            q, k, v = (x.index_select(0, by) for x, by in ((q, order), (k, padding.tokens), (v, padding.tokens)))
        num_keys = [group.slots.shape[0] for group in padding.groups]
        num_queries = [group.lengths.shape[0] for group in padding.groups] if last else num_keys
        parts = zip(q.split(num_queries), k.split(num_keys), v.split(num_keys), padding.groups, strict=True)
        out = torch.cat([self._within(*part, last).reshape(-1, width) for part in parts])
        if order is not None:
            out = torch.empty_like(out).index_copy(0, order, out)
        return self.out(out)

    def _within(self, q: Tensor, k: Tensor, v: Tensor, group: _Group, last: bool) -> Tensor:
        """Attention of one group's tokens: ``(t, H, d)``, or ``(b, H, d)`` of the last ones."""
        q = q[:, None] if last else group.pad(q)
        out = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, group.pad(k), group.pad(v))),
            attn_mask=group.last_mask() if last else group.mask,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=group.mask is None and not last,
        )
        out = out.transpose(1, 2)
        return out[:, 0] if last else out.flatten(0, 1).index_select(0, group.slots)


class Transformer(nn.Module):
    """A SequenceEncoder: ``(x (T, D), batch) -> (T, D)``."""

    needs_times = False

    def __init__(self, config: TransformerConfig, dim: int) -> None:
        super().__init__()
        if dim % config.num_heads:
            raise UserError(f"encoder.num_heads must divide the model width {dim}, got {config.num_heads}")
        self.config = config
        self.dim = dim
        self.layers = nn.ModuleList(TransformerBlock(config, dim) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.final_norm else nn.Identity()

    def forward(self, x: Tensor, batch: Any) -> Tensor:
        padding, again = _padding(batch, x.shape[0]), self.config.activation_checkpointing
        return self.norm(run_layers(self.layers, x, padding, activation_checkpointing=again))

    def last(self, x: Tensor, batch: Any) -> Tensor:
        """``(B, D)``, :meth:`forward` at the last token of each row but for rounding; no row may be empty."""
        padding = _padding(batch, x.shape[0])
        for layer in self.layers[:-1]:
            x = layer(x, padding)
        return self.norm(self.layers[-1](x, padding, batch.offsets[1:] - 1))

    def pairs(self, batch: Any) -> int:
        """(query, key) pairs that the causal mask leaves, exactly."""
        return flops.pairs(batch.offsets.diff(), batch.rows.get("num_targets"), batch.rows.get("num_contextual"))

    def forward_flops(self, tokens: int, pairs: int) -> dict[str, int]:
        """FLOPs by component (:mod:`gr.flops`)."""
        return flops.transformer_flops(
            dim=self.dim,
            num_layers=self.config.num_layers,
            ffn_dim=self.config.ffn_dim or self.dim,
            tokens=tokens,
            pairs=pairs,
        )


def build_transformer(config: TransformerConfig, dim: int, max_tokens: int) -> Transformer:
    """Registered in :data:`gr.modules.encoders.ENCODERS` as "transformer"; any length will do."""
    return Transformer(config, dim)
