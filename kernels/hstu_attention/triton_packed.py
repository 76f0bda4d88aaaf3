"""Kernel of HSTU attention for short rows: several whole rows a program, one tile of scores, each result written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr.kernels.hstu_attention.triton_scores import (
    add_clamped,
    add_diagonals,
    add_time_gradient,
    bucket_of,
    clamped_id,
    divisor_of,
    largest_of,
    load_edges,
    load_rows,
    sees,
    slope_of,
    spans,
    store_rows,
    time_half,
    twice_sigmoid,
)


@triton.jit
def _rows_of(
    offsets, num_contextual, num_targets, row, num_rows, window, full_tail, group,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` .. ``row + ROWS`` laid one behind another in a block of tokens.

    Returns:
        The first token (int64), how many there are, and for each token of the block: its row, position, the row's first
        target and shift of ids, and its spans (:func:`spans`) in tokens of the block.
    """
    base = tl.load(offsets + row).to(tl.int64)
    number = (tl.load(offsets + tl.minimum(row + ROWS, num_rows)) - base).to(tl.int32)
    token = tl.arange(0, BLOCK)
    each = tl.arange(0, ROWS_PADDED)
    starts = (tl.load(offsets + tl.minimum(row + each, num_rows)) - base).to(tl.int32)
    # An empty row begins where the next one does: the last row that begins at or before a token is the token's.
    begun = (starts[None, :] <= token[:, None]) & (each < ROWS)[None, :] & (row + each < num_rows)[None, :]
    own = row + tl.sum(begun.to(tl.int32), 1) - 1
    start = (tl.load(offsets + own) - base).to(tl.int32)
    length = (tl.load(offsets + own + 1) - base).to(tl.int32) - start
    context = token * 0
    first = length
    if num_contextual is not None:
        context = tl.load(num_contextual + own).to(tl.int32)
    if num_targets is not None:
        first = length - tl.load(num_targets + own).to(tl.int32)
    at = token - start
    low, high, low2, high2 = spans(
        at, length, context, first, window, full_tail, group,
        CAUSAL, num_contextual is not None, num_targets is not None,
    )  # fmt: skip
    shift = tl.maximum(context - 1, 0)
    return base, number, own, at, first, shift, low + start, high + start, low2 + start, high2 + start


@triton.jit(do_not_specialize=["window", "full_tail", "group", "num_rows", "num_edges"])
def packed_kernel(
    q, k, v, out, grad, d_q, d_k, d_v, offsets, num_contextual, num_targets, divisor,
    position, d_position, position_row, time_table, d_time, time_row, edges, num_edges, query_times, key_times, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, grad_token, grad_head,
    d_q_token, d_q_head, d_k_token, d_k_head, d_v_token, d_v_head,
    half_alpha, window, full_tail, group, heads, num_rows,
    CAUSAL: tl.constexpr, DIVISOR: tl.constexpr, CLAMPED_IDS: tl.constexpr, EDGES: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` of ROWS whole rows of one head, or with ``grad`` all their gradients; adds to the tables' gradients.

    The tile is (keys, queries) both ways. ``scale`` as in :func:`key_kernel`.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(0) // heads * ROWS
    base, number, own, at, first, shift, low, high, low2, high2 = _rows_of(
        offsets, num_contextual, num_targets, row, num_rows, window, full_tail, group, CAUSAL, ROWS, ROWS_PADDED, BLOCK
    )
    if number == 0:
        return
    token = tl.arange(0, BLOCK)
    inside = token < number
    seen = sees(token[:, None], low[None, :], high[None, :], low2[None, :], high2[None, :], num_targets is not None)
    seen = seen & inside[None, :]
    queries = load_rows(q + base * q_token + head * q_head, token, q_token, inside, D_QK, BLOCK_QK, True)
    keys = load_rows(k + base * k_token + head * k_head, token, k_token, inside, D_QK, BLOCK_QK, True)
    half = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * half_alpha
    if position is not None:
        ids = at
        if CLAMPED_IDS:
            ids = clamped_id(at, first, shift)
        half += tl.load(position + head * position_row + (ids[:, None] - ids[None, :]))
    if time_table is not None:
        q_times = tl.load(query_times + base + token, mask=inside, other=0)
        k_times = tl.load(key_times + base + token, mask=inside, other=0)
        apart = tl.abs(q_times[None, :] - k_times[:, None])
        edge_values = load_edges(edges, num_edges, EDGES)
        # Of the seen pairs: rows of a program may lie ages apart.
        highest = bucket_of(tl.max(tl.max(tl.where(seen, apart, 0), 1), 0), edge_values)
        lowest = bucket_of(tl.min(tl.min(tl.where(seen, apart, largest_of(edges)), 1), 0), edge_values)
        lowest = tl.minimum(lowest, highest)
        half = time_half(half, apart, lowest, highest, time_table + head * time_row, edges)
    by = divisor_of(divisor, own, base + token, inside, low, high, low2, high2, DIVISOR)
    values = load_rows(v + base * v_token + head * v_head, token, v_token, inside, D_V, BLOCK_V, True)
    if grad is None:
        u, _ = twice_sigmoid(half, FAST)
        weights = tl.where(seen, half * u, 0.0).to(values.dtype)
        total = tl.dot(tl.trans(weights), values, input_precision=PRECISION) / by[:, None]
        store_rows(out + base * out_token + head * out_head, token, out_token, total, inside, D_V, BLOCK_V)
    else:
        last = 1.0 / divisor if DIVISOR == "number" else 1.0
        weights, slope = slope_of(half, by[None, :], DIVISOR, FAST)
        weights = tl.where(seen, weights, 0.0).to(values.dtype)
        grads = load_rows(grad + base * grad_token + head * grad_head, token, grad_token, inside, D_V, BLOCK_V, True)
        total = tl.dot(weights, grads, input_precision=PRECISION) * last
        store_rows(d_v + base * d_v_token + head * d_v_head, token, d_v_token, total, inside, D_V, BLOCK_V)
        d_score = tl.where(seen, tl.dot(values, tl.trans(grads), input_precision=PRECISION) * slope, 0.0)
        if scale is not None:
            scale = tl.load(scale)
        if time_table is not None:
            add_time_gradient(d_score, apart, lowest, highest, d_time + head * time_row, edges, scale)
        if position is not None:
            d_position += head * position_row
            if CLAMPED_IDS:
                add_clamped(d_score, 0, at, at, first, shift, d_position, scale, BLOCK, BLOCK)
            else:
                add_diagonals(d_score, 0, d_position, scale, BLOCK, BLOCK)
        narrow = d_score.to(queries.dtype)
        total = tl.dot(narrow, queries, input_precision=PRECISION) * (half_alpha * last)
        store_rows(d_k + base * d_k_token + head * d_k_head, token, d_k_token, total, inside, D_QK, BLOCK_QK)
        total = tl.dot(tl.trans(narrow), keys, input_precision=PRECISION) * (half_alpha * last)
        store_rows(d_q + base * d_q_token + head * d_q_head, token, d_q_token, total, inside, D_QK, BLOCK_QK)
