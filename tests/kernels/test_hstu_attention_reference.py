"""The definition of HSTU attention against loops over pairs, dense bias, finite differences and itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention, visible_pairs
from gr.kernels.hstu_attention.reference import time_bucket


def loop_ids(length: int, c: int, t: int) -> tuple[list[int], int]:
    """Position ids of one sequence and the id of its targets, one token at a time."""
    ids = []
    for pos in range(length):
        p = max(pos - c + 1, 0) if c > 0 else pos
        ids.append(min(p, length - c + 1 - t if c > 0 else length - t))
    return ids, (length - c + 1 - t if c > 0 else length - t)


def loop_mask(length: int, c: int, t: int, causal: bool, window, full_tail, group) -> list[list[bool]]:
    """The mask of one sequence by its rules, one pair at a time."""
    ids, last = loop_ids(length, c, t)
    first_target = length - t
    seen = [[False] * length for _ in range(length)]
    for i in range(length):
        for j in range(length):
            is_target = j >= first_target
            ok = i == j or (ids[i] > ids[j] if causal else not is_target)
            if group and is_target and i >= first_target:
                ok = ok or ((i - first_target) // group == (j - first_target) // group and (j <= i or not causal))
            if window:
                ok = ok and (abs(ids[i] - ids[j]) <= window or (bool(full_tail) and ids[i] >= last - full_tail))
            if c > 0 and ids[i] == 0 and ids[j] < last:
                ok = True
            seen[i][j] = ok
    return seen


@st.composite
def cases(draw):
    """Rows (length, contextual, targets) and the options of a mask."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, 9))
        targets = draw(st.integers(0, length))
        rows.append((length, draw(st.integers(0, length - targets)), targets))
    optional = st.none() | st.integers(1, 5)
    return rows, {
        "causal": draw(st.booleans()),
        "window": draw(optional),
        "full_tail": draw(optional),
        "target_group": draw(optional),
    }


def offsets_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def mask_of(rows, options, contextual: bool = True, targets: bool = True) -> Mask:
    return Mask(
        num_contextual=torch.tensor([row[1] for row in rows]) if contextual else None,
        num_targets=torch.tensor([row[2] for row in rows]) if targets else None,
        **options,
    )


def random_qkv(tokens: int, heads: int = 2, dim_qk: int = 3, dim_v: int = 4, dtype=torch.float64):
    return [torch.randn(tokens, heads, d, dtype=dtype, requires_grad=True) for d in (dim_qk, dim_qk, dim_v)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.booleans(), st.booleans())
def test_mask_is_what_the_rules_say_pair_by_pair(case, contextual, targets):
    rows, options = case
    rows = [(n, c * contextual, t * targets) for n, c, t in rows]
    offsets = offsets_of(row[0] for row in rows)
    dense = visible_pairs(mask_of(rows, options, contextual, targets), offsets, max_seq_len=9)
    for row, (n, c, t) in enumerate(rows):
        expected = loop_mask(n, c, t, *options.values())
        assert dense[row, :n, :n].tolist() == expected
        assert int(dense[row].sum()) == sum(map(sum, expected)), "padding must not be seen"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cases(),
    st.sampled_from(["index", "target_clamped"]),
    st.sampled_from(["fixed", "row", "query", "visible"]),
)
def test_operator_is_its_formula_pair_by_pair(case, position_ids, divisor_kind):
    rows, options = case
    torch.manual_seed(0)
    offsets = offsets_of(row[0] for row in rows)
    total, size = (
        int(offsets[-1]),
        4,
    )  # P = 4 is shorter than the sequences: distances beyond use the table's ends
    q, k, v = random_qkv(total)
    position, time = torch.randn(2, 2 * size - 1).double(), torch.randn(12).double()
    key_times, query_times = torch.randint(0, 200, (2, total))
    divisor = {
        "fixed": 7.0,
        "row": torch.arange(1.0, len(rows) + 1),
        "query": torch.arange(1.0, total + 1),
        "visible": "visible",
    }[divisor_kind]
    out = hstu_attention(
        q,
        k,
        v,
        offsets,
        max_seq_len=9,
        divisor=divisor,
        alpha=0.5,
        mask=mask_of(rows, options),
        bias=RelativeBias(
            position_table=position,
            time_table=time,
            key_times=key_times,
            query_times=query_times,
            position_ids=position_ids,
        ),
    )
    for row, (n, c, t) in enumerate(rows):
        seen = loop_mask(n, c, t, *options.values())
        ids = loop_ids(n, c, t)[0] if position_ids == "target_clamped" else list(range(n))
        start = int(offsets[row])
        for i in range(n):
            expected = torch.zeros(2, 4, dtype=torch.float64)
            for j in range(n):
                a, b = start + i, start + j
                seconds = abs(int(query_times[a] - key_times[b]))
                bucket = min(math.floor(math.log(max(seconds, 1)) / 0.301), 11)
                place = min(max(ids[j] - ids[i] + size - 1, 0), 2 * size - 2)
                score = 0.5 * (q[a] * k[b]).sum(-1) + position[:, place] + time[bucket]
                expected += seen[i][j] * torch.nn.functional.silu(score)[:, None] * v[b]
            by_row = divisor_kind == "row" or (divisor_kind == "query" and total == len(rows))
            n_i = {"fixed": 7.0, "visible": max(sum(seen[i]), 1)}.get(divisor_kind) or (
                row + 1 if by_row else start + i + 1
            )
            torch.testing.assert_close(out[start + i], expected / n_i)


MASKS = {
    "causal": {},
    "window": {"window": 2, "full_tail": 1},
    "targets": {"num_targets": torch.tensor([2, 0, 1]), "target_group": 2},
    "all": {
        "window": 2,
        "num_targets": torch.tensor([2, 0, 1]),
        "num_contextual": torch.tensor([1, 0, 2]),
    },
    "bidirectional": {"causal": False, "num_targets": torch.tensor([2, 0, 1])},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shared", [True, False], ids=["shared_tables", "table_a_head"])
def test_gradients_are_right_tables_included(mask, shared):
    torch.manual_seed(1)
    offsets = offsets_of([4, 0, 3])
    q, k, v = random_qkv(7, dim_qk=2, dim_v=2)
    heads = () if shared else (2,)
    position = torch.randn(*heads, 5, dtype=torch.float64, requires_grad=True)
    time = torch.randn(*heads, 6, dtype=torch.float64, requires_grad=True)
    key_times, query_times = torch.randint(0, 20, (2, 7))

    def run(q, k, v, position, time):
        bias = RelativeBias(position_table=position, time_table=time, key_times=key_times, query_times=query_times)
        return hstu_attention(q, k, v, offsets, max_seq_len=4, divisor=3.0, alpha=0.7, mask=Mask(**mask), bias=bias)

    assert torch.autograd.gradcheck(run, (q, k, v, position, time))


def test_bias_equals_a_dense_bias_table_gradients_included():
    torch.manual_seed(2)
    batch, heads, n = 2, 2, 6
    offsets = offsets_of([n] * batch)
    q, k, v = random_qkv(batch * n)
    position = torch.randn(2 * n - 1, dtype=torch.float64, requires_grad=True)
    time = torch.randn(heads, 8, dtype=torch.float64, requires_grad=True)
    times = torch.randint(0, 30, (batch, n))
    query_times = times + 3
    grad = torch.randn(batch * n, heads, 4, dtype=torch.float64)

    bias = RelativeBias(
        position_table=position, time_table=time, key_times=times.flatten(), query_times=query_times.flatten()
    )
    out = hstu_attention(q, k, v, offsets, max_seq_len=n, divisor=5.0, alpha=1.0, bias=bias)
    ours = torch.autograd.grad(out, (q, k, v, position, time), grad)

    dq, dk, dv = (x.view(batch, n, heads, -1).transpose(1, 2) for x in (q, k, v))
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    seconds = (query_times[:, :, None] - times[:, None, :]).abs().clamp(min=1).double()
    buckets = (seconds.log() / 0.301).floor().long().clamp(max=7)
    dense = position[j - i + n - 1] + time[:, buckets].transpose(0, 1)  # (B, H, N, N)
    weights = torch.nn.functional.silu(dq @ dk.mT + dense) * (j <= i)
    expected = (weights @ dv).transpose(1, 2).reshape(batch * n, heads, -1) / 5.0
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (q, k, v, position, time), grad), strict=True):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.data(), st.sampled_from(["index", "target_clamped"]))
def test_last_rows_as_delta_equal_the_rows_of_the_full_form(case, data, position_ids):
    rows, options = case
    torch.manual_seed(3)
    lengths = [row[0] for row in rows]
    fresh = [data.draw(st.integers(0, n)) for n in lengths]
    offsets, q_offsets = offsets_of(lengths), offsets_of(fresh)
    q, k, v = random_qkv(int(offsets[-1]))
    times = torch.randint(0, 99, (int(offsets[-1]),))
    newest = torch.cat([torch.arange(end - new, end) for end, new in zip(offsets[1:].tolist(), fresh, strict=True)])
    tables = {"position_table": torch.randn(11).double(), "time_table": torch.randn(9).double()}
    common = {"max_seq_len": 9, "divisor": "visible", "alpha": 0.4, "mask": mask_of(rows, options)}

    def bias(query_times):
        return RelativeBias(key_times=times, query_times=query_times, position_ids=position_ids, **tables)

    full = hstu_attention(q, k, v, offsets, **common, bias=bias(times + 5))
    delta = hstu_attention(q[newest], k, v, q_offsets, offsets, **common, bias=bias((times + 5)[newest]))
    torch.testing.assert_close(delta, full[newest])


def test_targets_never_see_each_other_nor_does_history_see_them():
    torch.manual_seed(4)
    offsets = offsets_of([7, 5])
    mask = Mask(num_targets=torch.tensor([3, 2]))
    q, k, v = random_qkv(12)
    out = hstu_attention(q, k, v, offsets, max_seq_len=7, divisor=7.0, alpha=1.0, mask=mask)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[5], changed_v[5] = 9.0, 9.0  # the second of three targets of the first row
    again = hstu_attention(q, changed_k, changed_v, offsets, max_seq_len=7, divisor=7.0, alpha=1.0, mask=mask)
    others = [i for i in range(12) if i != 5]
    torch.testing.assert_close(again[others], out[others], rtol=0, atol=0)
    assert not torch.equal(again[5], out[5])


@pytest.mark.parametrize("divisor", [9.0, "visible", "length"])
def test_output_does_not_depend_on_batch_mates(divisor):
    torch.manual_seed(5)
    q, k, v = random_qkv(24)

    def run(tokens, lengths, max_seq_len):
        rule = torch.tensor(lengths) if divisor == "length" else divisor
        parts = (x[tokens] for x in (q, k, v))
        return hstu_attention(*parts, offsets_of(lengths), max_seq_len=max_seq_len, divisor=rule, alpha=1.0)

    alone = run(slice(0, 4), [4], 4)
    together = run(slice(0, 24), [4, 20], 500)
    torch.testing.assert_close(together[:4], alone, rtol=1e-12, atol=1e-12)


def test_buckets_are_exact_at_every_edge_of_int64_seconds():
    edges = {1, 2, 3, 2**24 + 1, 2**31, 2**53 - 1}
    for k in range(1, 123):
        near = int(math.exp(k * 0.301))
        edges.update(x for x in range(near - 2, near + 3) if 0 < x <= 2**53)
    seconds = sorted(edges)
    expected = [min(math.floor(math.log(x) / 0.301), 128) for x in seconds]
    assert time_bucket(torch.tensor(seconds), 0.301, 129).tolist() == expected
    assert time_bucket(-torch.tensor(seconds), 0.301, 129).tolist() == expected
    assert time_bucket(torch.tensor([0, 10**9]), 0.301, 5).tolist() == [0, 4]
    # 30 years reach bucket 68 or 69 only: the rest of the paper's table is never used.
    assert time_bucket(torch.tensor([30 * 366 * 86400]), 0.301, 129).tolist() == [68]


def test_layers_that_share_times_compute_buckets_once_and_never_take_stale_ones():
    torch.manual_seed(6)
    offsets = offsets_of([3])
    q, k, v = random_qkv(3)
    times, table = torch.tensor([0, 10, 500]), torch.randn(20).double()
    bias = RelativeBias(time_table=table, key_times=times, query_times=times)
    common = {"max_seq_len": 3, "divisor": 1.0, "alpha": 1.0}
    first = hstu_attention(q, k, v, offsets, **common, bias=bias)
    kept = bias.scratch["time_buckets"][2]
    hstu_attention(q, k, v, offsets, **common, bias=bias)
    assert bias.scratch["time_buckets"][2] is kept
    times += torch.tensor([0, 100, 1000])
    moved = hstu_attention(q, k, v, offsets, **common, bias=bias)
    fresh = RelativeBias(time_table=table, key_times=times, query_times=times)
    torch.testing.assert_close(moved, hstu_attention(q, k, v, offsets, **common, bias=fresh))
    assert not torch.equal(moved, first)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [0, 2, 0]], ids=str)
def test_empty_rows_and_empty_batches_work_forward_and_backward(lengths):
    offsets = offsets_of(lengths)
    q, k, v = random_qkv(int(offsets[-1]))
    position, time = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    times = torch.zeros(q.shape[0], dtype=torch.int64)
    bias = RelativeBias(position_table=position, time_table=time, key_times=times, query_times=times)
    mask = Mask(num_targets=torch.ones(len(lengths), dtype=torch.int64))
    out = hstu_attention(q, k, v, offsets, max_seq_len=2, divisor="visible", alpha=1.0, mask=mask, bias=bias)
    out.sum().backward()
    assert out.shape == (q.shape[0], 2, 4)
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v, position, time))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_definition_up_to_its_rounding(dtype):
    torch.manual_seed(7)
    offsets = offsets_of([5, 9])
    q, k, v = (x.detach() for x in random_qkv(14))
    bias = RelativeBias(position_table=torch.randn(17))
    common = {"max_seq_len": 9, "divisor": 9.0, "alpha": 0.5, "bias": bias}
    exact = hstu_attention(q, k, v, offsets, **common)
    low = hstu_attention(q.to(dtype), k.to(dtype), v.to(dtype), offsets, **common)
    assert low.dtype == dtype
    error = (low.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps
