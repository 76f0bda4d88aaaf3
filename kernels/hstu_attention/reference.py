"""The definition of HSTU attention in plain torch: any float dtype, any device, gradients by autograd.

Works on the padded form ``(B, H, N_q, N_k)``. Every other backend is tested against it, and it runs where no
faster backend exists. README.md in this folder states the formulas; names below follow it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.kernels.hstu_attention.time_buckets import time_bucket
from gr.kernels.hstu_attention.types import Arguments, Mask, divisor_by_query


class _Rows(NamedTuple):
    """The padded form of one jagged batch: ``width`` slots a row."""

    offsets: Tensor  # (B+1,)
    lengths: Tensor  # (B,) int64
    width: int

    def slots(self, num_values: int) -> Tensor:
        """``(T,)``: where a token lies in the flattened padded form."""
        device = self.offsets.device
        shift = torch.arange(self.lengths.shape[0], device=device) * self.width - self.offsets[:-1]
        shift = shift.repeat_interleave(self.lengths, output_size=num_values)
        return torch.arange(num_values, device=device) + shift

    def pad(self, values: Tensor, slots: Tensor) -> Tensor:
        """``(T, ...)`` -> ``(B, width, ...)`` with zeros in the empty slots."""
        batch = self.lengths.shape[0]
        padded = values.new_zeros((batch * self.width, *values.shape[1:]))
        return padded.index_copy(0, slots, values).view(batch, self.width, *values.shape[1:])


def _rows(offsets: Tensor, max_seq_len: int) -> _Rows:
    lengths = offsets.diff().long()
    # The batch's own maximum is free to read on the CPU; elsewhere reading it would stall the device. It only
    # sizes the padding and never enters the result.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        max_seq_len = int(lengths.max()) if lengths.shape[0] else 0
    return _Rows(offsets, lengths, max_seq_len)


def _positions(queries: _Rows, keys: _Rows, delta: bool) -> tuple[Tensor, Tensor]:
    """``(B or 1, N_q)`` and ``(1, N_k)``; in the delta form the queries are a sequence's last rows."""
    device = queries.lengths.device
    q_pos = torch.arange(queries.width, device=device)[None]
    if delta:
        q_pos = q_pos + (keys.lengths - queries.lengths)[:, None]
    return q_pos, torch.arange(keys.width, device=device)[None]


def mask_ids(position: Tensor, lengths: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Position ids of the mask (README, "Mask").

    Returns:
        ids ``(B or 1, N)`` and ``last`` ``(B, 1)``, the id shared by the targets, one above every history id.
    """
    ids, last = position, lengths[:, None]
    if mask.num_contextual is not None:
        shift = (mask.num_contextual.long()[:, None] - 1).clamp(min=0)
        ids, last = (ids - shift).clamp(min=0), last - shift
    if mask.num_targets is not None:
        last = last - mask.num_targets.long()[:, None]
        ids = torch.minimum(ids, last)
    return ids, last


def visible(q_pos: Tensor, k_pos: Tensor, lengths: Tensor, mask: Mask) -> Tensor:
    """``(B or 1, N_q, N_k)`` bool, exact for every query inside its sequence (the others are dropped)."""
    if mask.causal and mask.window is None and mask.num_contextual is None and mask.num_targets is None:
        return k_pos[:, None, :] <= q_pos[:, :, None]
    q_id, last = mask_ids(q_pos, lengths, mask)
    k_id, _ = mask_ids(k_pos, lengths, mask)
    q_id, k_id, last = q_id[:, :, None], k_id[:, None, :], last[:, :, None]
    distance = q_id - k_id
    seen = distance > 0 if mask.causal else k_id < last
    seen = seen | (q_pos[:, :, None] == k_pos[:, None, :])
    if mask.num_targets is not None and mask.target_group is not None:
        seen = seen | _same_group(q_pos, k_pos, lengths, mask)
    if mask.window is not None:
        near = distance.abs() <= mask.window
        if mask.full_tail is not None:
            near = near | (q_id >= last - mask.full_tail)
        seen = seen & near
    if mask.num_contextual is not None:
        has_context = (mask.num_contextual > 0)[:, None, None]
        seen = seen | (has_context & (q_id == 0) & (k_id < last))
    return seen


def _same_group(q_pos: Tensor, k_pos: Tensor, lengths: Tensor, mask: Mask) -> Tensor:
    first = (lengths - mask.num_targets.long())[:, None]
    q_rank, k_rank = (q_pos - first)[:, :, None], (k_pos - first)[:, None, :]
    same = (q_rank >= 0) & (k_rank >= 0) & (k_pos < lengths[:, None])[:, None, :]
    same = same & (q_rank.div(mask.target_group, rounding_mode="floor") == k_rank // mask.target_group)
    return same & (k_rank <= q_rank) if mask.causal else same


def visible_pairs(mask: Mask, q_offsets: Tensor, kv_offsets: Tensor | None = None, *, max_seq_len: int) -> Tensor:
    """The mask as a dense tensor, for tests and for attention that is not HSTU's.

    Returns:
        ``(B, N_q, N_k)`` bool, N the longest sequence (``max_seq_len`` off the CPU); padding is never
        visible.
    """
    queries = _rows(q_offsets, max_seq_len)
    keys = queries if kv_offsets is None else _rows(kv_offsets, max_seq_len)
    q_pos, k_pos = _positions(queries, keys, kv_offsets is not None)
    q_inside = torch.arange(queries.width, device=q_offsets.device) < queries.lengths[:, None]
    k_inside = k_pos < keys.lengths[:, None]
    return visible(q_pos, k_pos, keys.lengths, mask) & q_inside[:, :, None] & k_inside[:, None, :]


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``(K,)`` or ``(H, K)`` table at ``(b, N_q, N_k)`` -> ``(b, 1 or H, N_q, N_k)``.

    One 1-D index_select a head: its gradient is a plain scatter-add, much faster on a CPU than embedding's.
    """
    flat = index.reshape(-1)
    heads = [row.index_select(0, flat).view(index.shape) for row in (table[None] if table.dim() == 1 else table)]
    return torch.stack(heads, dim=1) if len(heads) > 1 else heads[0][:, None]


def hstu_attention_reference(call: Arguments) -> Tensor:
    """``out_i = (1 / divisor_i) * sum_j m_ij SiLU(alpha q_i . k_j + bias_ij) v_j`` for checked arguments.

    Shapes as in :func:`gr.kernels.hstu_attention.op.hstu_attention`.
    """
    q, k, v, mask, bias, divisor = call.q, call.k, call.v, call.mask, call.bias, call.divisor
    delta = call.kv_offsets is not None
    queries = _rows(call.q_offsets, call.max_seq_len)
    keys = _rows(call.kv_offsets, call.max_seq_len) if delta else queries
    q_slots = queries.slots(q.shape[0])
    k_slots = keys.slots(k.shape[0]) if delta else q_slots
    q_pos, k_pos = _positions(queries, keys, delta)

    padded_q = queries.pad(q * call.alpha, q_slots).transpose(1, 2)  # (B, H, N_q, d_qk)
    padded_k = keys.pad(k, k_slots).transpose(1, 2)
    padded_v = keys.pad(v, k_slots).transpose(1, 2)

    scores = padded_q @ padded_k.transpose(2, 3)
    if bias is not None and bias.position_table is not None:
        i, j = q_pos, k_pos
        if bias.position_ids == "target_clamped":
            i, j = mask_ids(q_pos, keys.lengths, mask)[0], mask_ids(k_pos, keys.lengths, mask)[0]
        half = bias.position_table.shape[-1] // 2  # P - 1
        distance = (j[:, None, :] - i[:, :, None] + half).clamp(0, 2 * half)
        scores.add_(_look_up(bias.position_table, distance))
    if bias is not None and bias.time_table is not None:
        q_times, k_times = queries.pad(bias.query_times.long(), q_slots), keys.pad(bias.key_times.long(), k_slots)
        seconds = q_times[:, :, None] - k_times[:, None, :]
        buckets = time_bucket(seconds, bias.bucket_width, bias.time_table.shape[-1])
        scores.add_(_look_up(bias.time_table, buckets))

    seen = visible(q_pos, k_pos, keys.lengths, mask)
    # Before SiLU, not after: SiLU(0) = 0 is what a masked pair gives, and where its score overflows, 0 times SiLU of it
    # or SiLU's derivative there would be NaN.
    weights = F.silu(scores.masked_fill_(~seen[:, None], 0.0))
    out = (weights @ padded_v).transpose(1, 2)  # (B, N_q, H, d_v)
    out = out.reshape(-1, *v.shape[1:]).index_select(0, q_slots)

    if isinstance(divisor, str):  # "visible"
        count = seen.sum(-1).clamp(min=1).expand(queries.lengths.shape[0], queries.width)
        divisor = count.reshape(-1).index_select(0, q_slots)
    else:
        divisor = divisor_by_query(divisor, queries.lengths, q.shape[0])
    # In float32 at least: bfloat16 would make a divisor of 4099 into 4096.
    wide = torch.promote_types(out.dtype, torch.float32)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(wide)[:, None, None]
    return (out.to(wide) / divisor).to(out.dtype)
