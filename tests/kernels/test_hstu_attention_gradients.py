"""Gradients of HSTU attention: finite differences over all pairs of options, loops, a dense bias, single rows."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from gr.kernels.hstu_attention import hstu_attention, visible_pairs
from hstu_cases import CASES, OPTIONS, Case, all_pairs, leaves, pairs_of, run
from hstu_oracles import loop_attention, loop_bucket, loop_ids, rows_of

attention = functools.partial(hstu_attention, backend="reference")
IDS = [case.id for case in CASES]
any_case = st.builds(Case, **{name: st.sampled_from(values) for name, values in OPTIONS.items()})


def assert_equal(ours, theirs):
    """Outputs and gradients of two ways to compute the same in float64."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, theirs[1][name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def gradients(out, arguments, grad):
    """Of every leaf; one that ``out`` does not depend on has a gradient of zeros."""
    named = leaves(arguments)
    found = torch.autograd.grad(out, list(named.values()), grad, materialize_grads=True)
    return out.detach(), dict(zip(named, found, strict=True))


def test_cases_cover_every_pair_of_option_values_under_unique_names():
    assert set().union(*(pairs_of(vars(case)) for case in CASES)) == all_pairs(OPTIONS)
    assert len(set(IDS)) == len(CASES) <= 40


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cases_have_an_empty_row_one_of_one_token_and_repeat_by_seed(case):
    arguments, again = case.arguments(seed=3), case.arguments(torch.bfloat16, seed=3)
    lengths = [len(row.keys) for row in rows_of(arguments)]
    assert {0, 1, 5} <= set(lengths)
    for name, leaf in leaves(arguments).items():
        assert leaf.is_leaf and leaf.requires_grad
        torch.testing.assert_close(leaves(again)[name].double(), leaf, rtol=2**-8, atol=0)
    assert again["q"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for n, t in leaves(again).items() if "table" in n)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_are_finite_differences(case):
    """Of q, k, v and both tables, delta form included."""
    arguments = case.arguments(seed=1, longest=4)
    named = leaves(arguments)

    def call(*values):
        changed = dict(zip(named, values, strict=True))
        tables = {name: changed.pop(name) for name in list(changed) if name.endswith("table")}
        bias = arguments["bias"]
        bias = bias and dataclasses.replace(bias, **tables)
        return attention(**(arguments | changed | {"bias": bias}))

    assert torch.autograd.gradcheck(call, tuple(named.values()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_case, st.integers(0, 99), st.integers(3, 7), st.integers(3, 5))
def test_operator_and_gradients_are_the_formula_pair_by_pair(case, seed, longest, batch):
    arguments = case.arguments(seed=seed, longest=longest, batch=batch)
    ours = run(arguments, backend="reference")
    grad = torch.randn(ours[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_equal(ours, gradients(loop_attention(arguments), arguments, grad))


def dense_attention(arguments):
    """The padded form with a bias that is a ``(B, H, N_q, N_k)`` tensor."""
    rows, bias = list(rows_of(arguments)), arguments["bias"]
    seen = visible_pairs(
        arguments["mask"], arguments["q_offsets"], arguments["kv_offsets"], max_seq_len=arguments["max_seq_len"]
    )
    index = {name: torch.zeros(seen.shape, dtype=torch.int64) for name in ("position_table", "time_table")}
    for row in rows:
        ids = list(range(len(row.keys)))
        if bias.position_ids == "target_clamped":
            ids, _ = loop_ids(len(row.keys), row.num_contextual, row.num_targets)
        for i, a in enumerate(row.queries):
            for j, b in enumerate(row.keys):
                if bias.position_table is not None:
                    largest = bias.position_table.shape[-1] - 1
                    place = ids[j] - ids[row.shift + i] + largest // 2
                    index["position_table"][row.number, i, j] = min(max(place, 0), largest)
                if bias.time_table is not None:
                    seconds = int(bias.query_times[a] - bias.key_times[b])
                    place = loop_bucket(seconds, bias.bucket_width, bias.time_table.shape[-1])
                    index["time_table"][row.number, i, j] = place
    heads = arguments["q"].shape[1]
    dense = torch.zeros(len(rows), heads, *seen.shape[1:], dtype=torch.float64)
    for name, places in index.items():
        table = getattr(bias, name)
        if table is not None:
            dense = dense + table.expand(heads, -1)[:, places].transpose(0, 1)
    q = pad_sequence([arguments["q"][row.queries] for row in rows], batch_first=True).transpose(1, 2)
    k, v = (pad_sequence([arguments[x][row.keys] for row in rows], batch_first=True).transpose(1, 2) for x in "kv")
    weights = torch.nn.functional.silu(arguments["alpha"] * q @ k.mT + dense) * seen[:, None]
    out = (weights @ v).transpose(1, 2)
    return torch.cat([out[row.number, : len(row.queries)] for row in rows])


@pytest.mark.parametrize("case", [case for case in CASES if case.position or case.time], ids=lambda case: case.id)
def test_tables_are_a_dense_bias_their_gradients_included(case):
    arguments = case.arguments(seed=5, longest=9, batch=5) | {"divisor": 1.0}
    ours = run(arguments, backend="reference")
    grad = torch.randn(ours[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_equal(ours, gradients(dense_attention(arguments), arguments, grad))


def take(arguments, queries, keys, q_lengths, kv_lengths, rows=slice(None)):
    """The same call for some tokens and rows only; leaves stay those of the whole call."""
    q_offsets, kv_offsets = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, kv_lengths))
    bias, mask, divisor = arguments["bias"], arguments["mask"], arguments["divisor"]
    if bias is not None and bias.time_table is not None:
        times = {"query_times": bias.query_times[queries], "key_times": bias.key_times[keys]}
        bias = dataclasses.replace(bias, **times)
    counts = {name: getattr(mask, name) for name in ("num_contextual", "num_targets")}
    counts = {name: None if count is None else count[rows] for name, count in counts.items()}
    if isinstance(divisor, torch.Tensor):  # one entry a query, whatever it was
        lengths = arguments["q_offsets"].diff()
        divisor = (divisor.repeat_interleave(lengths) if divisor.shape == lengths.shape else divisor.flatten())[queries]
        divisor = divisor[:, None]
    return arguments | {
        "q": arguments["q"][queries],
        "k": arguments["k"][keys],
        "v": arguments["v"][keys],
        "q_offsets": q_offsets,
        "kv_offsets": kv_offsets,
        "mask": dataclasses.replace(mask, **counts),
        "bias": bias,
        "divisor": divisor,
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_case.filter(lambda case: case.form == "full"), st.integers(0, 99), st.data())
def test_last_rows_as_delta_equal_the_rows_of_the_full_form(case, seed, data):
    arguments = case.arguments(seed=seed, longest=6)
    rows = list(rows_of(arguments))
    fresh = [data.draw(st.integers(0, len(row.keys))) for row in rows]
    newest = torch.tensor([i for row, n in zip(rows, fresh, strict=True) for i in row.keys[len(row.keys) - n :]]).long()
    every = torch.arange(arguments["k"].shape[0])
    delta = attention(**take(arguments, newest, every, fresh, [len(row.keys) for row in rows]))
    full = attention(**arguments)
    grad = torch.randn(delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_equal(gradients(delta, arguments, grad), gradients(full[newest], arguments, grad))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(any_case, st.integers(0, 99), st.integers(0, 50))
def test_a_row_alone_gives_what_it_gives_in_a_batch_gradients_included(case, seed, more):
    """Outputs and gradients of q, k, v row by row; table gradients are the sum over the rows."""
    arguments = case.arguments(seed=seed)
    together = run(arguments, backend="reference")
    alone = []
    for row in rows_of(arguments):
        queries, keys = torch.tensor(list(row.queries)).long(), torch.tensor(list(row.keys)).long()
        one = take(arguments, queries, keys, [len(queries)], [len(keys)], slice(row.number, row.number + 1))
        # The batch around a row may need more room; a table grows with it only where its middle stays in place.
        one["max_seq_len"] = arguments["max_seq_len"] + (more if not case.position or case.short_table else 0)
        alone.append(attention(**one))
    grad = torch.randn(together[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_equal(gradients(torch.cat(alone), arguments, grad), together)
