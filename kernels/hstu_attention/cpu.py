"""HSTU attention on a CPU: dense tiles of nearly equal rows, a hand-written backward (README.md, "Backward").

Scores are computed again in the backward pass, so that memory is that of q, k, v and one tile. float64 stays float64;
everything else is added up in float32. bfloat16 products are left to the processor where it has units for them (AMX,
AVX-512 BF16) and made in float32 where they would be slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.kernels.hstu_attention.cpu_plan import Detail, Group, Layout, Plan, Request, Tile, plan_for
from gr.kernels.hstu_attention.types import Arguments, Divisor, RelativeBias, divisor_by_query
from gr.kernels.native import has_bf16_units


class Block(NamedTuple):
    """A tile with its operands: ``(b * H, m, d)`` queries, ``(b * H, n, d)`` keys and values, views of padded ones."""

    tile: Tile
    detail: Detail
    query: Tensor
    key: Tensor
    value: Tensor


def forward(call: Arguments) -> Tensor:
    """``(T_q, H, d_v)`` of checked arguments."""
    q, v = call.q, call.v
    plan = _plan(call)
    table = _Tables(call.bias, plan, q)
    padded = _padded(call, plan)
    out = padded[0].new_zeros((plan.queries.sources.shape[0], v.shape[2]))
    for block in _blocks(plan, *padded):
        weights = _hide(F.silu(table.scores(block), inplace=True), block.detail)
        _queries(out, block.tile, plan).copy_(torch.bmm(weights.to(out.dtype), block.value))
    out = out.index_select(0, plan.queries.slots).view(q.shape[0], *v.shape[1:])
    return _divide(out, call.divisor, plan).to(v.dtype)


def backward(grad: Tensor, call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, the position table and the time table (None where there is none)."""
    q, k, v = call.q, call.k, call.v
    plan = _plan(call)
    table = _Tables(call.bias, plan, q)
    padded = _padded(call, plan)
    product, exact = padded[0].dtype, _accumulator(q)
    grads = _pad(_divide(grad.to(exact), call.divisor, plan).to(product), plan.queries)
    d_query, d_key, d_value = (torch.zeros(t.shape, dtype=exact) for t in padded)
    for block in _blocks(plan, *padded):
        tile, detail = block.tile, block.detail
        g = _queries(grads, tile, plan)
        scores = table.scores(block)
        weights = _hide(F.silu(scores), detail).to(product)
        _add_product(_keys(d_value, tile.group, detail, plan), weights.transpose(1, 2), g)
        d_weights = torch.bmm(g, block.value.transpose(1, 2)).to(exact)
        d_scores = _hide(torch.ops.aten.silu_backward(d_weights, scores), detail)
        table.add_gradient(d_scores, block)
        d_scores = d_scores.to(product)
        # A slot of d_query belongs to one tile; d_key and d_value are added to by each tile of their group.
        _queries(d_query, tile, plan).copy_(torch.bmm(d_scores, block.key))
        _add_product(_keys(d_key, tile.group, detail, plan), d_scores.transpose(1, 2), block.query)
    return (
        d_query.index_select(0, plan.queries.slots).mul_(call.alpha).view(q.shape).to(q.dtype),
        d_key.index_select(0, plan.keys.slots).view(k.shape).to(k.dtype),  # alpha is in the padded queries
        d_value.index_select(0, plan.keys.slots).view(v.shape).to(v.dtype),
        *table.gradients(),
    )


def _plan(call: Arguments) -> Plan:
    mask, bias = call.mask, call.bias or RelativeBias()
    timed, placed = bias.time_table is not None, bias.position_table is not None
    # Without context and targets the clamped ids are the tokens' indices. In the delta form a row's queries begin
    # anywhere, so that their distances to the keys are no Toeplitz matrix of the block.
    clamped = bias.position_ids == "target_clamped" and not (mask.num_contextual is None and mask.num_targets is None)
    by_pair = placed and (clamped or call.kv_offsets is not None)
    return plan_for(
        Request(
            q_offsets=call.q_offsets,
            kv_offsets=call.kv_offsets,
            mask=mask,
            num_heads=call.q.shape[1],
            num_buckets=bias.time_table.shape[-1] if timed else None,
            bucket_width=bias.bucket_width if timed else 0.0,
            query_times=bias.query_times.long() if timed else None,
            key_times=bias.key_times.long() if timed else None,
            position_entries=bias.position_table.shape[-1] if by_pair else None,
            clamped_ids=by_pair and clamped,
        )
    )


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _product(q: Tensor) -> torch.dtype:
    """Dtype of the operands of matrix products."""
    if q.dtype == torch.bfloat16 and has_bf16_units():
        return torch.bfloat16
    return _accumulator(q)


def _padded(call: Arguments, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    q, product = call.q, _product(call.q)
    query = (q.to(_accumulator(q)) * call.alpha).to(product) if call.alpha != 1.0 else q.to(product)
    return (
        _pad(query, plan.queries),
        _pad(call.k.to(product), plan.keys),
        _pad(call.v.to(product), plan.keys),
    )


def _pad(values: Tensor, layout: Layout) -> Tensor:
    """``(T, H, d)`` -> ``(rows, d)`` with zeros in the empty slots.

    By gathering and then clearing: torch's index_copy_ takes four to fifteen times as long.
    """
    if values.shape[0] == 0:
        return values.new_zeros((layout.sources.shape[0], values.shape[2]))
    padded = values.reshape(-1, values.shape[2]).index_select(0, layout.sources)
    return padded.index_fill_(0, layout.empty, 0.0)


def _blocks(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Block]:
    for number, tile in enumerate(plan.tiles):
        detail = plan.detail(number)
        if detail.keys[1] > detail.keys[0]:  # else the tile sees nothing
            group = tile.group
            keys, values = _keys(key, group, detail, plan), _keys(value, group, detail, plan)
            yield Block(tile, detail, _queries(query, tile, plan), keys, values)


def _queries(padded: Tensor, tile: Tile, plan: Plan) -> Tensor:
    """View ``(b * H, m, d)`` of a tile's queries."""
    group, heads, dim = tile.group, plan.request.num_heads, padded.shape[1]
    count, width = group.size * heads, group.num_queries
    start = group.q_start * heads + tile.begin
    return padded.as_strided((count, tile.end - tile.begin, dim), (width * dim, dim, 1), start * dim)


def _keys(padded: Tensor, group: Group, detail: Detail, plan: Plan) -> Tensor:
    """View ``(b * H, n, d)`` of the keys that a tile sees."""
    heads, dim, (low, high) = plan.request.num_heads, padded.shape[1], detail.keys
    start = group.k_start * heads + low
    return padded.as_strided((group.size * heads, high - low, dim), (group.num_keys * dim, dim, 1), start * dim)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def _hide(scores: Tensor, detail: Detail) -> Tensor:
    """Sets to 0, in place, what is not seen of ``(b * H, m, n)``."""
    if detail.diagonal is not None:
        return scores.tril_(detail.diagonal)
    if detail.hidden is not None:
        rows = detail.hidden.shape[0]
        scores.view(rows, -1, *scores.shape[1:]).masked_fill_(detail.hidden[:, None], 0.0)
    return scores


def _divide(out: Tensor, divisor: Divisor, plan: Plan) -> Tensor:
    """``(T_q, H, d)`` by each query's divisor."""
    each = (
        plan.visible_counts() if isinstance(divisor, str) else divisor_by_query(divisor, plan.q_lengths, out.shape[0])
    )
    return out / (each.to(out.dtype)[:, None, None] if isinstance(each, Tensor) else each)


class _Tables:
    """The bias of tiles, and the gradients of its tables.

    Where tokens are counted, the position bias of a tile is a Toeplitz matrix: a skewed view of a stretch of the
    table. ``_reach`` is the largest distance of the batch; a shorter table is extended by its ends.
    """

    def __init__(self, bias: RelativeBias | None, plan: Plan, q: Tensor) -> None:
        self.plan, self.heads = plan, q.shape[1]
        self.bias = bias
        self.time = self.position = None
        if bias is None:
            return
        exact = _accumulator(q)
        if bias.time_table is not None:
            self.time = _rows(bias.time_table, exact)
            self.d_time = torch.zeros(self.time.shape, dtype=torch.float64)
        if bias.position_table is not None:
            table = _rows(bias.position_table, exact)
            self._half = table.shape[1] // 2
            by_distance = plan.request.position_entries is None
            self._extra = max(0, plan.longest - 1 - self._half) if by_distance else 0
            ends = (table[:, :1].expand(-1, self._extra), table[:, -1:].expand(-1, self._extra))
            self.position = torch.cat((ends[0], table, ends[1]), dim=1) if self._extra else table
            self.d_position = torch.zeros(self.position.shape, dtype=torch.float64)

    def scores(self, block: Block) -> Tensor:
        """``(b * H, m, n)`` scores, bias included."""
        detail, key = block.detail, block.key.transpose(1, 2)
        added = self._bias(block)
        if added is None:
            return torch.bmm(block.query, key).to(_accumulator(block.query))
        shape = (block.query.shape[0], block.query.shape[1], block.key.shape[1])
        if added.numel() == shape[0] * shape[1] * shape[2] and added.dtype == key.dtype:
            return added.view(shape).baddbmm_(block.query, key)
        scores = torch.bmm(block.query, key).to(added.dtype)
        rows = block.tile.group.size
        scores.view(rows, self.heads, *shape[1:]).add_(added)
        assert detail.keys[1] - detail.keys[0] == shape[2]
        return scores

    def _bias(self, block: Block) -> Tensor | None:
        """``(b or 1, H or 1, m, n)``, a fresh tensor."""
        detail = block.detail
        shape = (block.tile.group.size, block.query.shape[1], block.key.shape[1])
        total = None
        if self.time is not None:
            total = _look_up(self.time, detail.time_index, shape)
        if self.position is not None:
            if detail.position_index is not None:
                part = _look_up(self.position, detail.position_index, shape)
            else:
                stretch, _ = self._stretch(self.position, block)
                part = stretch.unfold(1, shape[2], 1).flip(1)[None]
            total = part if total is None else _sum(total, part)
        return total

    def _stretch(self, table: Tensor, block: Block) -> tuple[Tensor, int]:
        """The distances of a tile: ``(H or 1, m + n - 1)`` view of the table, its last row's first."""
        low, high = block.detail.keys
        start = low - block.tile.end + 1 + self._half + self._extra
        size = block.tile.end - block.tile.begin + high - low - 1
        return table[:, start : start + size], start

    def add_gradient(self, d_scores: Tensor, block: Block) -> None:
        """Adds a tile's ``(b * H, m, n)`` score gradients to the tables' (in float64 over tiles)."""
        if self.time is None and self.position is None:
            return
        detail, rows = block.detail, block.tile.group.size
        each = d_scores.view(rows, self.heads, *d_scores.shape[1:])
        summed = each.sum(1, keepdim=True) if self.heads > 1 else each
        if self.time is not None:
            _add_at(self.d_time, detail.time_index, summed if self.time.shape[0] == 1 else each)
        if self.position is None:
            return
        own = summed if self.position.shape[0] == 1 else each
        if detail.position_index is not None:
            _add_at(self.d_position, detail.position_index, own)
        else:
            self._stretch(self.d_position, block)[0].add_(_diagonal_sums(own.sum(0)))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the position table and the time table, in their shapes and dtypes."""
        d_position = d_time = None
        if self.position is not None:
            total, extra = self.d_position, self._extra
            if extra:
                core = total[:, extra:-extra].clone()
                core[:, 0] += total[:, :extra].sum(1)
                core[:, -1] += total[:, -extra:].sum(1)
                total = core
            d_position = total.to(self.bias.position_table.dtype).view(self.bias.position_table.shape)
        if self.time is not None:
            d_time = self.d_time.to(self.bias.time_table.dtype).view(self.bias.time_table.shape)
        return d_position, d_time


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Their broadcast sum, in the memory of one of them where it fits."""
    if a.shape[0] >= b.shape[0] and a.shape[1] >= b.shape[1]:
        return a.add_(b)
    return b.add_(a) if b.shape[0] >= a.shape[0] and b.shape[1] >= a.shape[1] else a + b


def _rows(table: Tensor, dtype: torch.dtype) -> Tensor:
    """``(K,)`` or ``(H, K)`` -> ``(1 or H, K)``."""
    return table.detach().to(dtype).view(-1, table.shape[-1])


def _look_up(table: Tensor, index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """``(1 or H, K)`` at ``(b * m * n,)`` -> ``(b, 1 or H, m, n)``."""
    heads = [row.index_select(0, index).view(shape) for row in table]
    return torch.stack(heads, dim=1) if len(heads) > 1 else heads[0][:, None]


def _add_at(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Histogram: ``(b, 1 or H, m, n)`` values at ``(b * m * n,)`` into ``(1 or H, K)``."""
    for row, part in zip(total, values.unbind(1), strict=True):
        row.scatter_add_(0, index, part.reshape(-1).double())  # a bucket may gather a million pairs


def _diagonal_sums(values: Tensor) -> Tensor:
    """``(H, m, n)`` -> ``(H, m + n - 1)``, from the corner of the last row's first entry.

    Rows padded to n + m and read again with a length of n + m - 1 stand one column further right each.
    """
    heads, m, n = values.shape
    skewed = F.pad(values.flip(1), (0, m)).view(heads, -1)[:, : m * (n + m - 1)]
    return skewed.view(heads, m, n + m - 1).sum(1)
