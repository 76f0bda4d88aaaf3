"""Kernels of HSTU attention: a block of queries a program (output, dQ), a block of keys a program (dK, dV, tables)."""

from __future__ import annotations

import triton
import triton.language as tl

from gr.kernels.hstu_attention.triton_scores import (
    add_clamped,
    add_diagonals,
    add_time_gradient,
    clamped_id,
    count_of,
    divisor_of,
    load_rows,
    sees,
    spans,
    store_rows,
    tile_buckets,
    time_half,
    twice_sigmoid,
)


@triton.jit
def _add_keys(
    total, q, grad, start, q_id, q_times, low, high, low2, high2, k, v, k_times,
    k_token, v_token, k_length, first, shift, half_alpha, position, time_table, edges, num_edges,
    CLAMPED_IDS: tl.constexpr, TARGETS: tl.constexpr, STEPS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """``total`` plus what the keys of the tile at ``start`` give: of ``out``, or with ``grad`` of dQ."""
    key = start + tl.arange(0, BLOCK_N)
    inside = key < k_length
    keys = load_rows(k, key, k_token, inside, D_QK, BLOCK_QK, MASKED)
    half = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * half_alpha
    if position is not None:
        k_id = key
        if CLAMPED_IDS:
            k_id = clamped_id(key, first, shift)
        half += tl.load(position + (k_id[None, :] - q_id[:, None]))
    if time_table is not None:
        times = tl.load(k_times + tl.minimum(key, k_length - 1))
        lowest, highest = tile_buckets(q_times, times, edges, num_edges, STEPS)
        half = time_half(half, tl.abs(q_times[:, None] - times[None, :]), lowest, highest, time_table, edges)
    u = twice_sigmoid(half, FAST)
    values = load_rows(v, key, v_token, inside, D_V, BLOCK_V, MASKED)
    if grad is None:
        weights = half * u
    else:
        d_weights = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        weights = d_weights * (0.5 * u * (2.0 * half - half * u + 1.0))
    if MASKED:
        seen = sees(key[None, :], low[:, None], high[:, None], low2[:, None], high2[:, None], TARGETS)
        weights = tl.where(seen, weights, 0.0)
    if grad is None:
        total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    else:
        total = tl.dot(weights.to(keys.dtype), keys, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["window", "full_tail", "group", "num_blocks", "num_edges"])
def query_kernel(
    q, k, v, grad, out, q_offsets, k_offsets, num_contextual, num_targets, divisor,
    position, position_row, time_table, time_row, edges, num_edges, query_times, key_times,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, out_token, out_head,
    half_alpha, window, full_tail, group, heads, num_blocks,
    CAUSAL: tl.constexpr, DIVISOR: tl.constexpr, CLAMPED_IDS: tl.constexpr, STEPS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out`` of one block of queries of one (row, head); with ``grad``, the gradient of ``out``, dQ in its place.

    First the tiles of keys that every query sees whole, without a mask, then the others.
    """
    CONTEXT: tl.constexpr = num_contextual is not None
    TARGETS: tl.constexpr = num_targets is not None
    # The last blocks of a causal row are the longest: they start first.
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks % heads).to(tl.int64)
    row = tl.program_id(0) // num_blocks // heads
    q_start = tl.load(q_offsets + row).to(tl.int64)
    q_length = (tl.load(q_offsets + row + 1) - q_start).to(tl.int32)
    if block * BLOCK_M >= q_length:
        return
    k_start = tl.load(k_offsets + row).to(tl.int64)
    k_length = (tl.load(k_offsets + row + 1) - k_start).to(tl.int32)
    context = count_of(num_contextual, row)
    first = k_length - count_of(num_targets, row)
    shift = tl.maximum(context - 1, 0)

    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = query < q_length
    at = query + (k_length - q_length)
    low, high, low2, high2 = spans(at, k_length, context, first, window, full_tail, group, CAUSAL, CONTEXT, TARGETS)

    queries = load_rows(q + q_start * q_token + head * q_head, query, q_token, inside, D_QK, BLOCK_QK, True)
    grads = None
    if grad is not None:
        grads = load_rows(grad + q_start * grad_token + head * grad_head, query, grad_token, inside, D_V, BLOCK_V, True)
    k += k_start * k_token + head * k_head
    v += k_start * v_token + head * v_head
    q_id = at
    if CLAMPED_IDS:
        q_id = clamped_id(at, first, shift)
    if position is not None:
        position += head * position_row
    q_times = None
    if time_table is not None:
        q_times = tl.load(query_times + q_start + tl.minimum(query, q_length - 1))
        key_times += k_start
        time_table += head * time_row

    # Tiles [begin, end), of which [full, full_end) are seen whole; then the targets' own, [extra, extra_end).
    if CAUSAL and window is None and not CONTEXT and not TARGETS:
        begin = 0
        full = 0
        full_end = (block * BLOCK_M + (k_length - q_length) + 1) // BLOCK_N
        end = tl.cdiv(tl.minimum(block * BLOCK_M + BLOCK_M, q_length) + (k_length - q_length), BLOCK_N)
    else:
        begin = tl.min(tl.where(inside, low, k_length), 0) // BLOCK_N
        full = tl.cdiv(tl.max(tl.where(inside, low, 0), 0), BLOCK_N)
        full_end = tl.min(tl.where(inside, high, k_length), 0) // BLOCK_N
        end = tl.maximum(tl.cdiv(tl.max(tl.where(inside, high, 0), 0), BLOCK_N), begin)
    full_end = tl.maximum(full, full_end)
    if full_end == full:
        full = begin
        full_end = begin
    extra = end
    extra_end = end
    if TARGETS:
        extra = tl.maximum(tl.min(tl.where(inside & (high2 > low2), low2, k_length), 0) // BLOCK_N, end)
        extra_end = tl.maximum(tl.cdiv(tl.max(tl.where(inside, high2, 0), 0), BLOCK_N), extra)

    if grad is None:
        total = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_QK], dtype=tl.float32)
    for tile in range(full, full_end):
        total = _add_keys(
            total, queries, grads, tile * BLOCK_N, q_id, q_times, low, high, low2, high2, k, v, key_times,
            k_token, v_token, k_length, first, shift, half_alpha, position, time_table, edges, num_edges,
            CLAMPED_IDS, TARGETS, STEPS, FAST, PRECISION, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_N, False,
        )  # fmt: skip
    before = full - begin
    after = before + end - full_end
    for step in range(0, after + extra_end - extra):
        tile = tl.where(step < before, begin + step, full_end + step - before)
        if TARGETS:
            tile = tl.where(step < after, tile, extra + step - after)
        total = _add_keys(
            total, queries, grads, tile * BLOCK_N, q_id, q_times, low, high, low2, high2, k, v, key_times,
            k_token, v_token, k_length, first, shift, half_alpha, position, time_table, edges, num_edges,
            CLAMPED_IDS, TARGETS, STEPS, FAST, PRECISION, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_N, True,
        )  # fmt: skip
    by = divisor_of(divisor, row, q_start + query, inside, low, high, low2, high2, DIVISOR)
    total = total / by[:, None]
    out += q_start * out_token + head * out_head
    if grad is None:
        store_rows(out, query, out_token, total, inside, D_V, BLOCK_V)
    else:
        store_rows(out, query, out_token, total * (2.0 * half_alpha), inside, D_QK, BLOCK_QK)


@triton.jit(do_not_specialize=["window", "full_tail", "group", "num_blocks", "num_edges"])
def key_kernel(
    q, k, v, grad, d_k, d_v, q_offsets, k_offsets, num_contextual, num_targets, divisor,
    position, d_position, position_row, time_table, d_time, time_row, edges, num_edges, query_times, key_times,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, d_k_token, d_k_head, d_v_token, d_v_head,
    half_alpha, window, full_tail, group, heads, num_blocks,
    CAUSAL: tl.constexpr, DIVISOR: tl.constexpr, CLAMPED_IDS: tl.constexpr, STEPS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one (row, head); adds to the tables' gradients, an atomic a bucket or
    diagonal.
    """
    CONTEXT: tl.constexpr = num_contextual is not None
    TARGETS: tl.constexpr = num_targets is not None
    block = tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks % heads).to(tl.int64)
    row = tl.program_id(0) // num_blocks // heads
    k_start = tl.load(k_offsets + row).to(tl.int64)
    k_length = (tl.load(k_offsets + row + 1) - k_start).to(tl.int32)
    if block * BLOCK_N >= k_length:
        return
    q_start = tl.load(q_offsets + row).to(tl.int64)
    q_length = (tl.load(q_offsets + row + 1) - q_start).to(tl.int32)
    context = count_of(num_contextual, row)
    first = k_length - count_of(num_targets, row)
    shift = tl.maximum(context - 1, 0)

    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = key < k_length
    keys = load_rows(k + k_start * k_token + head * k_head, key, k_token, inside, D_QK, BLOCK_QK, True)
    values = load_rows(v + k_start * v_token + head * v_head, key, v_token, inside, D_V, BLOCK_V, True)
    q += q_start * q_token + head * q_head
    grad += q_start * grad_token + head * grad_head
    k_id = key
    if CLAMPED_IDS:
        k_id = clamped_id(key, first, shift)
    if position is not None:
        position += head * position_row
        d_position += head * position_row
    if time_table is not None:
        k_times = tl.load(key_times + k_start + tl.minimum(key, k_length - 1))
        query_times += q_start
        time_table += head * time_row
        d_time += head * time_row

    # Blocks of queries [begin, end): behind the first key where rows are causal, and within the window.
    late = k_length - q_length
    begin = 0
    end = tl.cdiv(q_length, BLOCK_M)
    if CAUSAL and not CONTEXT:
        begin = tl.maximum(block * BLOCK_N - late, 0) // BLOCK_M
    if window is not None and full_tail is None and not CONTEXT and not TARGETS:
        end = tl.minimum(end, tl.cdiv(tl.maximum(block * BLOCK_N + BLOCK_N - late + window, 0), BLOCK_M))

    total_k = tl.zeros([BLOCK_N, BLOCK_QK], dtype=tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for tile in range(begin, end):
        query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        there = query < q_length
        at = query + late
        low, high, low2, high2 = spans(at, k_length, context, first, window, full_tail, group, CAUSAL, CONTEXT, TARGETS)
        by = divisor_of(divisor, row, q_start + query, there, low, high, low2, high2, DIVISOR)
        queries = load_rows(q, query, q_token, there, D_QK, BLOCK_QK, True)
        grads = load_rows(grad, query, grad_token, there, D_V, BLOCK_V, True)
        half = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * half_alpha
        if position is not None:
            q_id = at
            if CLAMPED_IDS:
                q_id = clamped_id(at, first, shift)
            half += tl.load(position + (k_id[:, None] - q_id[None, :]))
        if time_table is not None:
            q_times = tl.load(query_times + tl.minimum(query, q_length - 1))
            lowest, highest = tile_buckets(q_times, k_times, edges, num_edges, STEPS)
            apart = tl.abs(q_times[None, :] - k_times[:, None])
            half = time_half(half, apart, lowest, highest, time_table, edges)
        u = twice_sigmoid(half, FAST)
        seen = sees(key[:, None], low[None, :], high[None, :], low2[None, :], high2[None, :], TARGETS) & there[None, :]
        seen = seen & inside[:, None]
        weights = tl.where(seen, half * u / by[None, :], 0.0)
        total_v = tl.dot(weights.to(grads.dtype), grads, total_v, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION) / by[None, :]
        d_score = tl.where(seen, d_weights * (0.5 * u * (2.0 * half - half * u + 1.0)), 0.0)
        total_k = tl.dot(d_score.to(queries.dtype), queries, total_k, input_precision=PRECISION)
        if time_table is not None:
            add_time_gradient(d_score, apart, lowest, highest, d_time, edges)
        if position is not None:
            if CLAMPED_IDS:
                add_clamped(d_score, key, at, first, shift, d_position, BLOCK_N, BLOCK_M)
            else:
                distance = block * BLOCK_N - (tile * BLOCK_M + late)
                add_diagonals(d_score, distance, d_position, BLOCK_N, BLOCK_M)
    d_k += k_start * d_k_token + head * d_k_head
    d_v += k_start * d_v_token + head * d_v_head
    store_rows(d_k, key, d_k_token, total_k * (2.0 * half_alpha), inside, D_QK, BLOCK_QK)
    store_rows(d_v, key, d_v_token, total_v, inside, D_V, BLOCK_V)
