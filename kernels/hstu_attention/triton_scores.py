"""Pieces of one tile of scores for Triton: what is seen, the bias, SiLU, and the gradients of the bias's tables.

Kernels hold half of a score, ``h = s / 2``: SiLU(s) = h (1 + tanh h), one multiplication less. Tables are halved before
a kernel sees them (triton_launch.py), and alpha / 2 is one factor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    pointer, index, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """``(len(index), BLOCK_D)`` of rows ``index``; zeros behind column D and, if masked, where not ``inside``."""
    column = tl.arange(0, BLOCK_D)
    at = pointer + index.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED and D != BLOCK_D:
        values = tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    elif MASKED:
        values = tl.load(at, mask=inside[:, None], other=0.0)
    elif D != BLOCK_D:
        values = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        values = tl.load(at)
    return values


@triton.jit
def store_rows(pointer, index, stride, values, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of :func:`load_rows`; converts to the pointer's dtype."""
    column = tl.arange(0, BLOCK_D)
    at = pointer + index.to(tl.int64)[:, None] * stride + column[None, :]
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def count_of(counts, row):
    """A row's count of contextual tokens or targets; 0 where there are none."""
    number = 0
    if counts is not None:
        number = tl.load(counts + row).to(tl.int32)
    return number


@triton.jit
def clamped_id(position, first, shift):
    """Position id of the mask (README, "Mask"): ``first`` is the first target's position, ``shift`` max(c - 1, 0)."""
    return tl.minimum(tl.maximum(position - shift, 0), first - shift)


@triton.jit
def spans(
    position, length, context, first, window, full_tail, group,
    CAUSAL: tl.constexpr, CONTEXT: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """What a query at ``position`` sees: keys [low, high) that are no targets, and targets [low2, high2).

    All arguments broadcast; ``first`` is the position of the first target. A window, a tail or a group that is not
    there is None.
    """
    shift = tl.maximum(context - 1, 0)
    last = first - shift
    none = position * 0
    low = none
    high = tl.minimum(position + 1, first) if CAUSAL else none + first
    if window is not None:
        at = clamped_id(position, first, shift)
        limited = at > window
        upper = tl.minimum(high, at + shift + window + 1)
        if full_tail is not None:
            limited = limited & (at < last - full_tail)
            upper = tl.where(at < last - full_tail, upper, high)
        low = tl.where(limited, at + shift - window, none)
        if not CAUSAL:
            high = upper
    if CONTEXT:
        low = tl.where(position < context, none, low)
        high = tl.where(position < context, none + first, high)
    low2 = none
    high2 = none
    if TARGETS:
        begin = position
        end = position + 1
        if group is not None:
            begin = first + tl.maximum(position - first, 0) // group * group
            if not CAUSAL:
                end = tl.minimum(begin + group, length)
        low2 = tl.where(position >= first, begin, none)
        high2 = tl.where(position >= first, end, none)
    return low, high, low2, high2


@triton.jit
def sees(key, low, high, low2, high2, TARGETS: tl.constexpr):
    """Whether the key lies in the query's spans."""
    seen = (key >= low) & (key < high)
    if TARGETS:
        seen = seen | ((key >= low2) & (key < high2))
    return seen


@triton.jit
def load_edges(edges, num_edges, EDGES: tl.constexpr):
    """The buckets' edges, in the times' dtype, in EDGES places; those that are none are beyond every distance."""
    index = tl.arange(0, EDGES)
    return tl.load(edges + index, mask=index < num_edges, other=largest_of(edges))


@triton.jit
def largest_of(integers):
    """The largest value of the dtype, int32 or int64, that a pointer points to."""
    return 0x7FFFFFFF if integers.dtype.element_ty == tl.int32 else 0x7FFFFFFFFFFFFFFF


@triton.jit
def bucket_of(seconds, edge_values):
    """Number of edges <= seconds, a scalar."""
    return tl.sum((edge_values <= seconds).to(tl.int32), 0)


@triton.jit
def tile_buckets(q_times, k_times, edge_values):
    """Lowest and highest bucket of a tile, from the ends of its times: never too narrow, exact for times that rise."""
    q_first = tl.min(q_times, 0)
    q_last = tl.max(q_times, 0)
    k_first = tl.min(k_times, 0)
    k_last = tl.max(k_times, 0)
    far = tl.maximum(q_last - k_first, k_last - q_first)
    near = tl.maximum(tl.maximum(q_first - k_last, k_first - q_last), 0)
    return bucket_of(near, edge_values), bucket_of(far, edge_values)


@triton.jit
def time_half(half, apart, low, high, table, edges):
    """``half`` plus half the time bias of a tile whose buckets lie in [low, high]: exact, a comparison an edge."""
    bias = tl.zeros_like(half) + tl.load(table + low)
    for bucket in range(low + 1, high + 1):
        bias = tl.where(apart >= tl.load(edges + bucket - 1), tl.load(table + bucket), bias)
    return half + bias


@triton.jit
def tanh_fast(x):
    """One special-function instruction; error 2**-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def twice_sigmoid(half, FAST: tl.constexpr):
    """``u = 1 + tanh(h)`` and ``w = 2 - u``: SiLU = h u, SiLU' = u (1 + h w) / 2. Exact means no difference: each of u
    and w is right to an ulp or so however small it is, and nothing overflows.
    """
    if FAST:
        tanh = tanh_fast(half)
        u = 1.0 + tanh
        w = 1.0 - tanh
    else:
        small = tl.exp(-2.0 * tl.abs(half))
        large = 2.0 / (1.0 + small)
        small = small * large
        u = tl.where(half >= 0.0, large, small)
        w = tl.where(half >= 0.0, small, large)
    return u, w


@triton.jit
def slope_of(half, by, DIVISOR: tl.constexpr, FAST: tl.constexpr):
    """SiLU of the scores and twice its derivative, over ``by``, which broadcasts; a number is left to the last factor
    of each result.
    """
    u, w = twice_sigmoid(half, FAST)
    rest = 1.0 + half * w
    if DIVISOR != "number":
        u = u * (1.0 / by)
    return half * u, u * rest


@triton.jit
def add_to(pointer, values, scale):
    """Atomic sums: of float64, or with a ``scale`` of integers, whose sum does not depend on the order."""
    if scale is None:
        tl.atomic_add(pointer, values.to(tl.float64), sem="relaxed")
    else:
        tl.atomic_add(pointer, (values.to(tl.float64) * scale).to(tl.int64), sem="relaxed")


@triton.jit
def add_time_gradient(d_score, apart, low, high, gradient, edges, scale):
    """Sums of a tile by bucket, of which there are those from ``low`` to ``high``: an atomic a bucket."""
    rest = d_score
    for bucket in range(low, high):
        near = apart < tl.load(edges + bucket)
        add_to(gradient + bucket, tl.sum(tl.sum(tl.where(near, rest, 0.0), 1), 0), scale)
        rest = tl.where(near, 0.0, rest)
    add_to(gradient + high, tl.sum(tl.sum(rest, 1), 0), scale)


@triton.jit
def add_diagonals(
    d_score, distance, centre, scale, NUM_KEYS: tl.constexpr, NUM_QUERIES: tl.constexpr
):  # fmt: skip
    """Sums of a ``(keys, queries)`` tile along its diagonals; ``distance`` is that of its corner.

    Column b is turned by b rows, so that row e holds the diagonals e, e - NUM_KEYS, ...; then rows are summed.
    """
    row = tl.arange(0, NUM_KEYS)
    turned = row[:, None] + tl.arange(0, NUM_QUERIES)[None, :]
    skewed = tl.gather(d_score, turned % NUM_KEYS, 0)
    turns = turned // NUM_KEYS
    for turn in tl.static_range((NUM_KEYS + NUM_QUERIES - 2) // NUM_KEYS + 1):
        part = tl.sum(tl.where(turns == turn, skewed, 0.0), 1)
        add_to(centre + distance + row - turn * NUM_KEYS, part, scale)


@triton.jit
def add_clamped(
    d_score, distance, key, query, first, shift, centre, scale,
    NUM_KEYS: tl.constexpr, NUM_QUERIES: tl.constexpr,
):  # fmt: skip
    """:func:`add_diagonals` by the mask's ids; ``key`` and ``query`` are positions within their row.

    Where neither id is clamped they differ as the positions do. Tokens of one clamped id are summed first, each against
    the other side's ids. ``first`` and ``shift`` are one row's, or each token's own where a tile holds several rows.
    """
    key_free = (key >= shift) & (key <= first)
    query_free = (query >= shift) & (query <= first)
    if (tl.min(key_free.to(tl.int32), 0) + tl.min(query_free.to(tl.int32), 0)) == 2:
        add_diagonals(d_score, distance, centre, scale, NUM_KEYS, NUM_QUERIES)
    else:
        key_id = clamped_id(key, first, shift)
        query_id = clamped_id(query, first, shift)
        last = first - shift
        free = key_free[:, None] & query_free[None, :]
        add_diagonals(tl.where(free, d_score, 0.0), distance, centre, scale, NUM_KEYS, NUM_QUERIES)
        early = tl.sum(tl.where((query < shift)[None, :], d_score, 0.0), 1)
        add_to(centre + key_id, early, scale)
        late = tl.sum(tl.where((query > first)[None, :], d_score, 0.0), 1)
        add_to(centre + key_id - last, late, scale)
        rest = tl.where(query_free[None, :], d_score, 0.0)
        early = tl.sum(tl.where((key < shift)[:, None], rest, 0.0), 0)
        add_to(centre - query_id, early, scale)
        late = tl.sum(tl.where((key > first)[:, None], rest, 0.0), 0)
        add_to(centre + last - query_id, late, scale)


@triton.jit
def divisor_of(
    divisor, row, query, inside, low, high, low2, high2, DIVISOR: tl.constexpr
):  # fmt: skip
    """Divisor of each query, float32; ``query`` are tokens. DIVISOR: "number", "row", "query" or "visible"."""
    if DIVISOR == "number":
        by = (query * 0).to(tl.float32) + divisor
    elif DIVISOR == "row":
        by = (query * 0).to(tl.float32) + tl.load(divisor + row)
    elif DIVISOR == "query":
        by = tl.load(divisor + query, mask=inside, other=1.0)
    else:
        by = tl.maximum(high - low + high2 - low2, 1).to(tl.float32)
    return by
