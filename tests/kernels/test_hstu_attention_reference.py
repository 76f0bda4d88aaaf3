"""The definition of HSTU attention: mask, buckets, precision, empty batches (gradients have a file of their own)."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention, visible_pairs
from gr.kernels.hstu_attention.time_buckets import bucket_edges, time_bucket
from hstu_cases import OPTIONS, Case
from hstu_oracles import loop_bucket, loop_mask, rows_of

attention = functools.partial(hstu_attention, backend="reference")
any_case = st.builds(Case, **{name: st.sampled_from(values) for name, values in OPTIONS.items()})


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
        expected = loop_mask(n, c, t, Mask(**options))
        assert dense[row, :n, :n].tolist() == expected
        assert int(dense[row].sum()) == sum(map(sum, expected)), "padding must not be seen"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_case.filter(lambda case: case.targets), st.integers(0, 99), st.data())
def test_targets_of_other_groups_and_history_do_not_see_a_target(case, seed, data):
    """Bit for bit: whatever a target's key and value are, only its own group, and in it what may see it, moves."""
    arguments = case.arguments(seed=seed, longest=9)
    rows = list(rows_of(arguments))
    targets = [(row, rank) for row in rows for rank in range(row.num_targets)]
    assume(targets)
    row, rank = data.draw(st.sampled_from(targets))
    changed = row.keys[len(row.keys) - row.num_targets + rank]
    k, v = arguments["k"].detach().clone(), arguments["v"].detach().clone()
    k[changed], v[changed] = 9.0, 9.0
    out, again = attention(**arguments), attention(**(arguments | {"k": k, "v": v}))
    may_move = {
        query
        for position, query in enumerate(row.queries, start=row.shift)
        if (other := position - (len(row.keys) - row.num_targets)) >= 0
        and other // case.targets == rank // case.targets
        and (other >= rank or not case.causal)
    }
    moved = (again != out).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert set(moved) <= may_move
    own = len(row.keys) - row.num_targets + rank - row.shift
    assert own < 0 or row.queries[own] in moved, "a target sees itself"


@pytest.mark.parametrize("divisor", [9.0, "visible", "length"])
def test_output_does_not_depend_on_batch_mates_whatever_their_lengths(divisor):
    torch.manual_seed(5)
    q, k, v = random_qkv(24)

    def run(tokens, lengths, max_seq_len):
        rule = torch.tensor(lengths) if divisor == "length" else divisor
        parts = (x[tokens] for x in (q, k, v))
        return attention(*parts, offsets_of(lengths), max_seq_len=max_seq_len, divisor=rule, alpha=1.0)

    alone = run(slice(0, 4), [4], 4)
    together = run(slice(0, 24), [4, 20], 500)
    torch.testing.assert_close(together[:4], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_masked_pair_gives_nothing_even_where_its_score_overflows(dtype):
    """Two targets: the score of one with the other is infinite, of either sign; no NaN, gradients as without it."""
    large = 2 * torch.finfo(dtype).max ** 0.5  # its square overflows
    offsets, mask = offsets_of([4]), Mask(num_targets=torch.tensor([2]))
    torch.manual_seed(8)
    q, k, v = (x.detach().to(dtype) for x in random_qkv(4, dim_v=3))
    q[3], q[2], k[2] = 0.0, torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]], dtype=dtype) * large, 0.0
    k[:2, :, 0] = 0.0  # history's scores with the first target stay small
    results = []
    for far in (large, 0.0):
        key = k.clone()
        key[3] = far
        leaf = [x.clone().requires_grad_() for x in (q, key, v)]
        out = attention(*leaf, offsets, max_seq_len=4, divisor=2.0, alpha=1.0, mask=mask)
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    assert not torch.tensor(large, dtype=dtype).square().isfinite(), "the score does overflow"
    assert all(x.isfinite().all() for x in results[0])
    torch.testing.assert_close(results[0][0][:3], results[1][0][:3], rtol=0, atol=0)
    for grad in (1, 3):  # of q and v
        torch.testing.assert_close(results[0][grad][:3], results[1][grad][:3], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["number", "row", "query", "visible"])
def test_a_large_divisor_is_not_rounded_to_the_dtype_of_the_values(dtype, kind):
    """bfloat16 makes 257 into 256 and 4099 into 4096, float16 4099 into 4100."""
    n = 257
    torch.manual_seed(10)
    values, zeros = torch.randn(n, 1, 64).to(dtype), torch.zeros(n, 1, 1, dtype=dtype)
    call = {"q_offsets": torch.tensor([0, n]), "max_seq_len": n, "alpha": 1.0, "mask": Mask(causal=False)}
    call["bias"] = RelativeBias(time_table=torch.ones(1), key_times=torch.zeros(n).long(), query_times=torch.arange(n))
    whole = attention(zeros, zeros, values, divisor=1.0, **call).float()
    for number in (257, 4099) if kind != "visible" else (n,):
        divisor = {"number": number, "row": torch.tensor([number]), "query": torch.full((n,), number)}.get(kind, kind)
        out = attention(zeros, zeros, values, divisor=divisor, **call)
        torch.testing.assert_close(out, (whole / number).to(dtype), rtol=0, atol=0)


WIDTHS = [0.301, 0.05, 0.25, math.log(2), 1.0, 3.5, 0.004]  # the last is too narrow for a table of leading bits


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_buckets", [1, 5, 129, 2048])
def test_buckets_are_exact_around_every_edge_of_int64_seconds(width, num_buckets):
    near = {1, 2, 3, 2**24 + 1, 2**31, 2**53 - 1, 2**53, *bucket_edges(width, num_buckets)}
    near |= {int(math.exp(k * width)) for k in range(1, min(num_buckets, int(36.7 / width)))}
    seconds = sorted({x + d for x in near for d in (-2, -1, 0, 1, 2) if 0 < x + d <= 2**53})
    expected = [min(math.floor(math.log(x) / width), num_buckets - 1) for x in seconds]
    assert time_bucket(torch.tensor(seconds), width, num_buckets).tolist() == expected
    assert time_bucket(-torch.tensor(seconds), width, num_buckets).tolist() == expected
    assert time_bucket(torch.tensor([[0]]), width, num_buckets).tolist() == [[0]]


def test_thirty_years_reach_bucket_68_and_the_rest_of_the_papers_table_is_never_used():
    assert time_bucket(torch.tensor([0, 30 * 366 * 86400]), 0.301, 129).tolist() == [0, 68]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(-(2**53), 2**53), max_size=20), st.floats(0.01, 5.0), st.integers(1, 300))
def test_buckets_are_the_formula_for_any_seconds_and_width(seconds, width, num_buckets):
    expected = [min(math.floor(math.log(max(abs(x), 1)) / width), num_buckets - 1) for x in seconds]
    assert time_bucket(torch.tensor(seconds, dtype=torch.int64), width, num_buckets).tolist() == expected


def test_buckets_of_many_values_in_any_layout_are_those_of_each_alone():
    torch.manual_seed(9)
    seconds = torch.randint(-(10**8), 10**8, (7, 10_007, 3)).transpose(0, 2)  # more than one chunk, not contiguous
    some = torch.randint(0, seconds.numel(), (200,))
    expected = [loop_bucket(int(x), 0.301, 129) for x in seconds.flatten()[some]]
    assert time_bucket(seconds, 0.301, 129).flatten()[some].tolist() == expected
    edges = torch.tensor(bucket_edges(0.301, 129))
    assert torch.equal(
        time_bucket(seconds, 0.301, 129).long(), torch.bucketize(seconds.abs().contiguous(), edges, right=True)
    )


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [0, 2, 0]], ids=str)
def test_empty_rows_and_empty_batches_work_forward_and_backward(lengths):
    offsets = offsets_of(lengths)
    q, k, v = random_qkv(int(offsets[-1]))
    position, time = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    times = torch.zeros(q.shape[0], dtype=torch.int64)
    bias = RelativeBias(position_table=position, time_table=time, key_times=times, query_times=times)
    mask = Mask(num_targets=torch.ones(len(lengths), dtype=torch.int64))
    out = attention(q, k, v, offsets, max_seq_len=2, divisor="visible", alpha=1.0, mask=mask, bias=bias)
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
    exact = attention(q, k, v, offsets, **common)
    low = attention(q.to(dtype), k.to(dtype), v.to(dtype), offsets, **common)
    assert low.dtype == dtype
    error = (low.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps
