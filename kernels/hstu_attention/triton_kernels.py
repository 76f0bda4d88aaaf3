"""Kernels of HSTU attention for rows of any length: a block of queries a program, or a block of keys a program.

Scores are made again backward. ``h``, ``u`` and ``w`` as in triton_scores.py: with ``da = g v^T`` the gradient of a
score is ``da u (1 + h w) / (2 n)``. The half goes into the last factor of each result, and so does an n that is a
number.
"""

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
    load_edges,
    load_rows,
    sees,
    slope_of,
    spans,
    store_rows,
    tile_buckets,
    time_half,
    twice_sigmoid,
)


@triton.jit
def _add_keys(
    total, q, grad, start, q_id, q_times, low, high, low2, high2, k, v, k_times,
    k_token, v_token, k_length, first, shift, half_alpha, position, time_table, edges, edge_values,
    CLAMPED_IDS: tl.constexpr, TARGETS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
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
        lowest, highest = tile_buckets(q_times, times, edge_values)
        half = time_half(half, tl.abs(q_times[:, None] - times[None, :]), lowest, highest, time_table, edges)
    values = load_rows(v, key, v_token, inside, D_V, BLOCK_V, MASKED)
    if grad is None:
        u, _ = twice_sigmoid(half, FAST)
        weights = half * u
    else:
        _, slope = slope_of(half, 1.0, "number", FAST)
        weights = tl.dot(grad, tl.trans(values), input_precision=PRECISION) * slope
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
    q, k, v, grad, out, q_offsets, k_offsets, order, num_contextual, num_targets, divisor,
    position, position_row, time_table, time_row, edges, num_edges, query_times, key_times,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, out_token, out_head,
    half_alpha, window, full_tail, group, heads, num_blocks,
    CAUSAL: tl.constexpr, DIVISOR: tl.constexpr, CLAMPED_IDS: tl.constexpr, EDGES: tl.constexpr,
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
    if order is not None:
        row = tl.load(order + row)
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
    edge_values = None
    if time_table is not None:
        q_times = tl.load(query_times + q_start + tl.minimum(query, q_length - 1))
        key_times += k_start
        time_table += head * time_row
        edge_values = load_edges(edges, num_edges, EDGES)

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
            k_token, v_token, k_length, first, shift, half_alpha, position, time_table, edges, edge_values,
            CLAMPED_IDS, TARGETS, FAST, PRECISION, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_N, False,
        )  # fmt: skip
    before = full - begin
    after = before + end - full_end
    for step in range(0, after + extra_end - extra):
        tile = tl.where(step < before, begin + step, full_end + step - before)
        if TARGETS:
            tile = tl.where(step < after, tile, extra + step - after)
        total = _add_keys(
            total, queries, grads, tile * BLOCK_N, q_id, q_times, low, high, low2, high2, k, v, key_times,
            k_token, v_token, k_length, first, shift, half_alpha, position, time_table, edges, edge_values,
            CLAMPED_IDS, TARGETS, FAST, PRECISION, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_N, True,
        )  # fmt: skip
    by = divisor_of(divisor, row, q_start + query, inside, low, high, low2, high2, DIVISOR)
    total = total / by[:, None]
    out += q_start * out_token + head * out_head
    if grad is None:
        store_rows(out, query, out_token, total, inside, D_V, BLOCK_V)
    else:
        store_rows(out, query, out_token, total * half_alpha, inside, D_QK, BLOCK_QK)


@triton.jit
def _add_queries(
    d_k, d_v, keys, values, k, v, k_token, v_token, key, block, q, grad, d_q, q_token, grad_token, d_q_token,
    q_start, q_length, k_times, query_times, k_length, context, first, shift, half_alpha, divisor, row,
    position, d_position, time_table, d_time, edges, edge_values, scale, window, full_tail, group,
    CAUSAL: tl.constexpr, CONTEXT: tl.constexpr, TARGETS: tl.constexpr, DIVISOR: tl.constexpr,
    CLAMPED_IDS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """d_k and d_v (without their last factors) plus what one block of queries gives; adds to d_q and to the tables.
    Loads ``keys`` and ``values`` where they are None.

    Tiles are (keys, queries), so that the products that end in d_k and d_v take theirs as it is made. Queries behind
    the row's end are zeros, and so is all that they give.
    """
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = query < q_length
    at = query + (k_length - q_length)
    queries = load_rows(q, query, q_token, inside, D_QK, BLOCK_QK, True)
    if keys is None:
        keys = load_rows(k, key, k_token, key < k_length, D_QK, BLOCK_QK, True)
    half = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * half_alpha
    if position is not None:
        k_id = key
        q_id = at
        if CLAMPED_IDS:
            k_id = clamped_id(key, first, shift)
            q_id = clamped_id(at, first, shift)
        half += tl.load(position + (k_id[:, None] - q_id[None, :]))
    if time_table is not None:
        q_times = tl.load(query_times + tl.minimum(query, q_length - 1))
        lowest, highest = tile_buckets(q_times, k_times, edge_values)
        apart = tl.abs(q_times[None, :] - k_times[:, None])
        half = time_half(half, apart, lowest, highest, time_table, edges)
    low, high, low2, high2 = spans(at, k_length, context, first, window, full_tail, group, CAUSAL, CONTEXT, TARGETS)
    by = divisor_of(divisor, row, q_start + query, inside, low, high, low2, high2, DIVISOR)
    weights, slope = slope_of(half, by[None, :], DIVISOR, FAST)
    grads = load_rows(grad, query, grad_token, inside, D_V, BLOCK_V, True)
    if values is None:
        values = load_rows(v, key, v_token, key < k_length, D_V, BLOCK_V, True)
    d_score = tl.dot(values, tl.trans(grads), input_precision=PRECISION) * slope
    if MASKED:
        seen = sees(key[:, None], low[None, :], high[None, :], low2[None, :], high2[None, :], TARGETS)
        weights = tl.where(seen, weights, 0.0)
        d_score = tl.where(seen, d_score, 0.0)
    d_v = tl.dot(weights.to(grads.dtype), grads, d_v, input_precision=PRECISION)
    if time_table is not None:
        add_time_gradient(d_score, apart, lowest, highest, d_time, edges, scale)
    if position is not None:
        distance = tl.min(key, 0) - tl.min(at, 0)
        if CLAMPED_IDS:
            add_clamped(d_score, distance, key, at, first, shift, d_position, scale, BLOCK_N, BLOCK_M)
        else:
            add_diagonals(d_score, distance, d_position, scale, BLOCK_N, BLOCK_M)
    narrow = d_score.to(queries.dtype)
    d_k = tl.dot(narrow, queries, d_k, input_precision=PRECISION)
    if d_q is not None:
        part = tl.dot(tl.trans(narrow), keys, input_precision=PRECISION)
        column = tl.arange(0, BLOCK_QK)
        tl.atomic_add(
            d_q + query.to(tl.int64)[:, None] * d_q_token + column[None, :],
            part, mask=inside[:, None] & (column < D_QK)[None, :], sem="relaxed",
        )  # fmt: skip
    return d_k, d_v


@triton.jit
def _query_blocks(
    key_start, k_length, late, q_length, context, first, shift, window, full_tail, group,
    CAUSAL: tl.constexpr, CONTEXT: tl.constexpr, TARGETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Blocks of queries that may see a key of the block: [0, early), [begin, end) and [tail, tail_end), apart.

    Returns:
        early, begin, end, tail, tail_end, and [full, full_end) within [begin, end): blocks that see every key.
    """
    key_end = tl.minimum(key_start + BLOCK_N, k_length)
    newest = tl.minimum(key_end, first) - 1  # the last key that is no target; meant where there is one
    newest_id = clamped_id(newest, first, shift)
    # Positions [a, b) of queries that see keys which are no targets; [c, d): those that no window limits.
    a = key_start * 0
    b = a + k_length
    c = b
    d = b
    if CAUSAL:
        a = key_start
    if window is not None:
        if not CAUSAL:
            oldest = clamped_id(key_start, first, shift) - window
            a = tl.where(oldest > 0, oldest + shift, 0)
        b = tl.minimum(first, newest_id + window + shift + 1)
        if full_tail is not None:
            c = tl.maximum(first - full_tail, 0)
        else:
            c = tl.where(first - shift - newest_id <= window, first, k_length)
        if CAUSAL:
            c = tl.maximum(c, key_start)
    e = a * 0
    if CONTEXT:
        e = e + context
    if TARGETS:  # keys that are all targets
        only = key_start >= first
        group_start = key_start
        group_end = key_end
        if group is not None:
            if not CAUSAL:
                group_start = first + tl.maximum(key_start - first, 0) // group * group
            group_end = tl.minimum(first + (tl.maximum(key_end - 1 - first, 0) // group + 1) * group, k_length)
        a = tl.where(only, group_start, a)
        b = tl.where(only, group_end, b)
        c = tl.where(only, k_length, c)
        e = tl.where(only, 0, e)
    early = tl.cdiv(tl.minimum(tl.maximum(e - late, 0), q_length), BLOCK_M)
    begin = tl.maximum(tl.minimum(tl.maximum(a - late, 0), q_length) // BLOCK_M, early)
    end = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(b - late, 0), q_length), BLOCK_M), begin)
    end = tl.where(a < b, end, begin)
    tail = tl.maximum(tl.minimum(tl.maximum(c - late, 0), q_length) // BLOCK_M, end)
    tail_end = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(d - late, 0), q_length), BLOCK_M), tail)
    tail_end = tl.where(c < d, tail_end, tail)

    full = begin
    full_end = end
    whole = key_start + BLOCK_N <= first
    if CAUSAL:
        full = tl.cdiv(tl.maximum(key_start + BLOCK_N - 1 - late, 0), BLOCK_M)
    if window is not None:
        if not CAUSAL:
            full = tl.cdiv(tl.maximum(newest - window - late, 0), BLOCK_M)
        near = key_start + window + 1 - late  # queries before this one are near enough to every key
        full_end = tl.where(near >= q_length, end, tl.maximum(near, 0) // BLOCK_M)
    full = tl.where(whole, tl.minimum(tl.maximum(full, begin), end), end)
    full_end = tl.where(whole, tl.minimum(tl.maximum(full_end, full), end), full)
    return early, begin, end, tail, tail_end, full, full_end


@triton.jit(do_not_specialize=["window", "full_tail", "group", "num_blocks", "num_edges"])
def key_kernel(
    q, k, v, grad, d_q, d_k, d_v, q_offsets, k_offsets, order, num_contextual, num_targets, divisor,
    position, d_position, position_row, time_table, d_time, time_row, edges, num_edges, query_times, key_times, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head,
    d_q_token, d_q_head, d_k_token, d_k_head, d_v_token, d_v_head,
    half_alpha, window, full_tail, group, heads, num_blocks,
    CAUSAL: tl.constexpr, DIVISOR: tl.constexpr, CLAMPED_IDS: tl.constexpr, EDGES: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one (row, head); adds to the tables, and to ``d_q`` if it is not None: float32,
    without the factor alpha / 2 and 1 / n if n is a number.

    With ``scale`` (float64, no dimension) the tables are int64.
    """
    CONTEXT: tl.constexpr = num_contextual is not None
    TARGETS: tl.constexpr = num_targets is not None
    block = tl.program_id(0) % num_blocks  # the first keys of a causal row have the most queries: they start first
    head = (tl.program_id(0) // num_blocks % heads).to(tl.int64)
    row = tl.program_id(0) // num_blocks // heads
    if order is not None:
        row = tl.load(order + row)
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
    k += k_start * k_token + head * k_head
    v += k_start * v_token + head * v_head
    # A float32 product takes its operands into registers, and those that are the same for every block would stay there:
    # too many of a wide head, which loads its keys and values again for each block of queries.
    keys = None
    values = None
    if not (k.dtype.element_ty == tl.float32 and BLOCK_QK + BLOCK_V >= 256):
        keys = load_rows(k, key, k_token, inside, D_QK, BLOCK_QK, True)
        values = load_rows(v, key, v_token, inside, D_V, BLOCK_V, True)
    q += q_start * q_token + head * q_head
    grad += q_start * grad_token + head * grad_head
    if d_q is not None:
        d_q += q_start * d_q_token + head * d_q_head
    if position is not None:
        position += head * position_row
        d_position += head * position_row
    k_times = None
    edge_values = None
    if time_table is not None:
        k_times = tl.load(key_times + k_start + tl.minimum(key, k_length - 1))
        query_times += q_start
        time_table += head * time_row
        d_time += head * time_row
        edge_values = load_edges(edges, num_edges, EDGES)
    if scale is not None:
        scale = tl.load(scale)

    early, begin, end, tail, tail_end, full, full_end = _query_blocks(
        block * BLOCK_N, k_length, k_length - q_length, q_length, context, first, shift, window, full_tail, group,
        CAUSAL, CONTEXT, TARGETS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    total_k = tl.zeros([BLOCK_N, BLOCK_QK], dtype=tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for tile in range(full, full_end):
        total_k, total_v = _add_queries(
            total_k, total_v, keys, values, k, v, k_token, v_token, key, tile, q, grad, d_q, q_token, grad_token,
            d_q_token, q_start, q_length, k_times, query_times, k_length, context, first, shift, half_alpha,
            divisor, row, position, d_position, time_table, d_time, edges, edge_values, scale, window, full_tail, group,
            CAUSAL, CONTEXT, TARGETS, DIVISOR, CLAMPED_IDS, FAST, PRECISION,
            D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    second = early + full - begin
    third = second + end - full_end
    for step in range(0, third + tail_end - tail):
        tile = tl.where(step < early, step, begin + step - early)
        tile = tl.where(step < second, tile, full_end + step - second)
        tile = tl.where(step < third, tile, tail + step - third)
        total_k, total_v = _add_queries(
            total_k, total_v, keys, values, k, v, k_token, v_token, key, tile, q, grad, d_q, q_token, grad_token,
            d_q_token, q_start, q_length, k_times, query_times, k_length, context, first, shift, half_alpha,
            divisor, row, position, d_position, time_table, d_time, edges, edge_values, scale, window, full_tail, group,
            CAUSAL, CONTEXT, TARGETS, DIVISOR, CLAMPED_IDS, FAST, PRECISION,
            D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    last = 1.0 / divisor if DIVISOR == "number" else 1.0
    d_k += k_start * d_k_token + head * d_k_head
    d_v += k_start * d_v_token + head * d_v_head
    store_rows(d_k, key, d_k_token, total_k * (half_alpha * last), inside, D_QK, BLOCK_QK)
    store_rows(d_v, key, d_v_token, total_v * last, inside, D_V, BLOCK_V)
