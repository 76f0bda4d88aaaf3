"""The operator's arguments that are more than a tensor (mask, relative bias, divisor), and all of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# One number, ``(B,)``, ``(T_q,)`` or ``(T_q, 1)``, or the number of keys that a query sees.
Divisor = float | Tensor | Literal["visible"]


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
        position_table: ``(2P-1,)`` shared by the heads, or ``(H, 2P-1)``, P at least ``max_seq_len``.
        clamp_positions: Allow a shorter position table; distances beyond it use its end entries (the reference's
            max_pos_ind).
        time_table: ``(num_buckets,)`` shared by the heads, or ``(H, num_buckets)``.
        key_times: ``(T_kv,)`` int64 seconds; needed with ``time_table``. int32 where all times lie in [0, 2^31 - 1):
            kernels in 16 bits then have larger tiles, with the same result.
        query_times: ``(T_q,)`` seconds of the same dtype; in the paper's protocol the time of the event to be
            predicted.
        bucket_width: Width of a time bucket in units of the natural logarithm (the base is e**width, about
            1.35).
        position_ids: "index" counts tokens; "target_clamped" takes the ids of the mask, where all targets
            share one id and all contextual tokens share id 0.
    """

    position_table: Tensor | None = None
    clamp_positions: bool = False
    time_table: Tensor | None = None
    key_times: Tensor | None = None
    query_times: Tensor | None = None
    bucket_width: float = 0.301
    position_ids: Literal["index", "target_clamped"] = "index"


@dataclass(frozen=True, kw_only=True, eq=False)
class Arguments:
    """One call of the operator: what its checks, its definition and every backend take.

    Attributes as the arguments of :func:`gr.kernels.hstu_attention.op.hstu_attention`, defaults filled in.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    kv_offsets: Tensor | None = None
    max_seq_len: int
    divisor: Divisor
    alpha: float
    mask: Mask
    bias: RelativeBias | None = None
    deterministic: bool = False


def divisor_by_query(divisor: float | Tensor, q_lengths: Tensor, num_queries: int) -> float | Tensor:
    """A number as it is; any tensor that is right as a divisor, as ``(T_q,)`` of its own dtype.

    Args:
        divisor: A number, ``(B,)``, ``(T_q,)`` or ``(T_q, 1)``; where B = T_q one dimension means ``(B,)``.
        q_lengths: ``(B,)`` integers, the queries of each row.
        num_queries: T_q.
    """
    if not isinstance(divisor, Tensor):
        return divisor
    if divisor.dim() == 1 and divisor.shape[0] == q_lengths.shape[0]:
        return divisor.repeat_interleave(q_lengths, output_size=num_queries)
    return divisor.reshape(-1)
