"""The definition of HSTU attention in plain torch: any float dtype, any device, gradients by autograd.

Works on the padded form ``(B, H, N_q, N_k)``. Every other backend is tested against it, and it runs where no
faster backend exists; so the plain causal case makes no ``(B, N, N)`` mask, and what depends on the times
alone is computed once for all layers. README.md in this folder states the formulas; names below follow it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Divisor = float | Tensor | Literal["visible"]

# Above 2**53 a float64 no longer holds every integer, so the definition of a bucket ends there.
_LARGEST_EXACT = 2.0**53


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Which (query, key) pairs of one sequence are seen; every field combines with every other.

    A sequence is ``num_contextual`` context tokens, then history, then ``num_targets`` targets.

    Attributes:
        causal: A token sees only what precedes it, and itself.
        window: Largest distance of position ids that is seen (the reference's max_attn_len); None is no
            limit.
        full_tail: With ``window``: the newest ``full_tail`` history tokens and all targets ignore the window
            (the reference's min_full_attn_seq_len).
        num_contextual: ``(B,)`` integers, or None for none.
        num_targets: ``(B,)`` integers, or None for none.
        target_group: Targets come in groups of this many consecutive tokens; a target sees its own group
            (up to itself if causal) and no other. None is 1: a target sees no other target.
    """

    causal: bool = True
    window: int | None = None
    full_tail: int | None = None
    num_contextual: Tensor | None = None
    num_targets: Tensor | None = None
    target_group: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RelativeBias:
    """Added to a score: ``position_table[p_j - p_i + P - 1] + time_table[bucket(query_times_i -
    key_times_j)]``.

    Attributes:
        position_table: ``(2P-1,)`` shared by the heads, or ``(H, 2P-1)``; distances beyond the table use its
            ends.
        time_table: ``(num_buckets,)`` shared by the heads, or ``(H, num_buckets)``.
        key_times: ``(T_kv,)`` int64 seconds; needed with ``time_table``.
        query_times: ``(T_q,)`` int64 seconds; in the paper's protocol the time of the event to be predicted.
        bucket_width: Width of a time bucket in units of the natural logarithm (the base is e**width, about
            1.35).
        position_ids: "index" counts tokens; "target_clamped" takes the ids of the mask, where all targets
            share one id and all contextual tokens share id 0.
        scratch: What a backend derives from the times alone. Copies made by ``dataclasses.replace`` share it,
            so the layers of a stack, which differ in their tables only, compute the buckets once a batch.
    """

    position_table: Tensor | None = None
    time_table: Tensor | None = None
    key_times: Tensor | None = None
    query_times: Tensor | None = None
    bucket_width: float = 0.301
    position_ids: Literal["index", "target_clamped"] = "index"
    scratch: dict = field(default_factory=dict, repr=False)


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
    if lengths.device.type == "cpu":
        max_seq_len = int(lengths.max()) if lengths.shape[0] else 0
    return _Rows(offsets, lengths, max_seq_len)


def _positions(queries: _Rows, keys: _Rows, delta: bool) -> tuple[Tensor, Tensor]:
    """``(B or 1, N_q)`` and ``(1, N_k)``; in the delta form the queries are a sequence's last rows."""
    device = queries.lengths.device
    q_pos = torch.arange(queries.width, device=device)[None]
    if delta:
        q_pos = q_pos + (keys.lengths - queries.lengths)[:, None]
    return q_pos, torch.arange(keys.width, device=device)[None]


def _mask_ids(position: Tensor, lengths: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
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


def _visible(q_pos: Tensor, k_pos: Tensor, lengths: Tensor, mask: Mask) -> Tensor:
    """``(B or 1, N_q, N_k)`` bool, exact for every query inside its sequence (the others are dropped)."""
    if mask.causal and mask.window is None and mask.num_contextual is None and mask.num_targets is None:
        return k_pos[:, None, :] <= q_pos[:, :, None]
    q_id, last = _mask_ids(q_pos, lengths, mask)
    k_id, _ = _mask_ids(k_pos, lengths, mask)
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
    return _visible(q_pos, k_pos, keys.lengths, mask) & q_inside[:, :, None] & k_inside[:, None, :]


@cache
def _bucket_edges(width: float, num_buckets: int) -> tuple[int, ...]:
    """Smallest integer of each bucket above 0: look-up by edge equals floor(ln(x) / width) exactly."""

    def bucket(x: int) -> int:
        return math.floor(math.log(x) / width)

    edges = []
    for k in range(1, num_buckets):
        if k * width >= math.log(_LARGEST_EXACT):
            break
        x = max(int(math.exp(k * width)), 1)
        while bucket(x) < k:
            x += 1
        while x > 1 and bucket(x - 1) >= k:
            x -= 1
        edges.append(x)
    return tuple(edges)


def time_bucket(seconds: Tensor, width: float, num_buckets: int) -> Tensor:
    """``clamp(floor(ln(max(|x|, 1)) / width), 0, num_buckets - 1)`` of int64 seconds, exact up to 2**53.

    A binary search among the buckets' integer edges: no float rounding, and half the memory of a float64
    logarithm.

    Returns:
        int32 of the same shape.
    """
    edges = _edge_tensor(width, num_buckets, seconds.device)
    return torch.bucketize(seconds.abs(), edges, right=True, out_int32=True)


@cache
def _edge_tensor(width: float, num_buckets: int, device: torch.device) -> Tensor:
    """Made once: a copy to a GPU from pageable memory in each forward would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(_bucket_edges(width, num_buckets), dtype=torch.int64, device=device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``(K,)`` or ``(H, K)`` table at ``(b, N_q, N_k)`` -> ``(b, 1 or H, N_q, N_k)``.

    One 1-D index_select a head: its gradient is a plain scatter-add, some 30 times as fast on a CPU as
    embedding's (backward alone).
    """
    flat = index.reshape(-1)
    heads = [row.index_select(0, flat).view(index.shape) for row in (table[None] if table.dim() == 1 else table)]
    return torch.stack(heads, dim=1) if len(heads) > 1 else heads[0][:, None]


def _time_buckets(bias: RelativeBias, queries: _Rows, keys: _Rows, q_slots: Tensor, k_slots: Tensor) -> Tensor:
    num_buckets = bias.time_table.shape[-1]
    # Identity and version of everything the buckets depend on. (Inference tensors have no version: whoever changes
    # one in place must make a new RelativeBias, as HSTU does for each forward.)
    inputs = (bias.query_times, bias.key_times, queries.offsets, keys.offsets)
    versions = ((id(t), None if t.is_inference() else t._version) for t in inputs)
    key = (num_buckets, bias.bucket_width, queries.width, keys.width, *versions)
    found = bias.scratch.get("time_buckets")
    if found is None or found[0] != key:
        seconds = (
            queries.pad(bias.query_times.long(), q_slots)[:, :, None]
            - keys.pad(bias.key_times.long(), k_slots)[:, None, :]
        )
        # The inputs stand beside the key so that they live on and no other tensor can take their ids.
        found = (key, inputs, time_bucket(seconds, bias.bucket_width, num_buckets))
        bias.scratch["time_buckets"] = found
    return found[2]


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    *,
    max_seq_len: int,
    divisor: Divisor,
    alpha: float,
    mask: Mask,
    bias: RelativeBias | None,
) -> Tensor:
    """``out_i = (1 / divisor_i) * sum_j m_ij SiLU(alpha q_i . k_j + bias_ij) v_j`` for checked arguments.

    Shapes as in :func:`gr.kernels.hstu_attention.op.hstu_attention`.
    """
    delta = kv_offsets is not None
    queries = _rows(q_offsets, max_seq_len)
    keys = _rows(kv_offsets, max_seq_len) if delta else queries
    q_slots = queries.slots(q.shape[0])
    k_slots = keys.slots(k.shape[0]) if delta else q_slots
    q_pos, k_pos = _positions(queries, keys, delta)

    padded_q = queries.pad(q * alpha, q_slots).transpose(1, 2)  # (B, H, N_q, d_qk)
    padded_k = keys.pad(k, k_slots).transpose(1, 2)
    padded_v = keys.pad(v, k_slots).transpose(1, 2)

    scores = padded_q @ padded_k.transpose(2, 3)
    if bias is not None and bias.position_table is not None:
        i, j = q_pos, k_pos
        if bias.position_ids == "target_clamped":
            i, j = _mask_ids(q_pos, keys.lengths, mask)[0], _mask_ids(k_pos, keys.lengths, mask)[0]
        half = bias.position_table.shape[-1] // 2  # P - 1
        distance = (j[:, None, :] - i[:, :, None] + half).clamp(0, 2 * half)
        scores.add_(_look_up(bias.position_table, distance))
    if bias is not None and bias.time_table is not None:
        scores.add_(_look_up(bias.time_table, _time_buckets(bias, queries, keys, q_slots, k_slots)))

    seen = _visible(q_pos, k_pos, keys.lengths, mask)
    weights = F.silu(scores).mul_(seen[:, None].to(scores.dtype))
    out = (weights @ padded_v).transpose(1, 2)  # (B, N_q, H, d_v)
    out = out.reshape(-1, *v.shape[1:]).index_select(0, q_slots)

    if isinstance(divisor, Tensor):
        if divisor.shape[0] == queries.lengths.shape[0]:
            divisor = divisor.repeat_interleave(queries.lengths, output_size=q.shape[0])
        return out / divisor.to(out.dtype)[:, None, None]
    if divisor == "visible":
        count = seen.sum(-1).clamp(min=1).expand(queries.lengths.shape[0], queries.width)
        return out / count.reshape(-1).index_select(0, q_slots).to(out.dtype)[:, None, None]
    return out / divisor
