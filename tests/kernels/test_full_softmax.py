"""The softmax over a catalogue: the blocked form against the definition in fp64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.kernels.full_softmax import blocked, full_softmax_loss


def case(s: int, v: int, d: int, dtype=torch.float64, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    leaf = lambda *shape: (torch.randn(*shape, generator=g, dtype=torch.float64) * spread).to(dtype).requires_grad_()  # noqa: E731
    return leaf(s, d), leaf(v, d), torch.randint(v, (s,), generator=g), torch.rand(s, generator=g) * 3


def run(query, vectors, target, weight, backend):
    """The loss, and the gradients of 0.7 times it."""
    loss = full_softmax_loss(query, vectors, target, weight, backend=backend)
    return loss.detach(), *torch.autograd.grad(0.7 * loss, (query, vectors))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(blocked.BLOCK_LOGITS, "cpu", 32)
    monkeypatch.setattr(blocked, "LEAST_ROWS", 1)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_definition_is_minus_the_log_of_the_targets_share(s, v, d, seed):
    query, vectors, target, weight = case(s, v, d, seed=seed)
    q, items = query.tolist(), vectors.tolist()
    logits = [[sum(a * b for a, b in zip(row, item, strict=True)) for item in items] for row in q]
    slow = 0.0
    for row, t, w in zip(logits, target.tolist(), weight.tolist(), strict=True):
        slow -= w * math.log(math.exp(row[t]) / sum(map(math.exp, row)))
    for backend in ("reference", "blocked"):
        assert full_softmax_loss(query, vectors, target, weight, backend=backend).item() == pytest.approx(
            slow, rel=1e-9
        )


@pytest.mark.parametrize(("s", "v", "d"), [(0, 3, 2), (1, 1, 1), (3, 40, 5), (8, 4, 50), (65, 31, 8), (64, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_block_at_a_time_is_as_exact_as_the_definition_in_the_same_dtype(s, v, d, dtype, small_blocks):
    exact = run(*case(s, v, d), "reference")
    low, got = (run(*case(s, v, d, dtype), backend) for backend in ("reference", "blocked"))
    for truth, definition, found in zip(exact, low, got, strict=True):
        assert found.dtype == definition.dtype and found.shape == definition.shape
        if not truth.numel():
            continue
        allowed = max(2 * float((definition - truth).abs().max()), 16 * torch.finfo(found.dtype).eps)
        assert float((found - truth).abs().max()) <= allowed * max(1.0, float(truth.abs().max()))


def test_what_leads_by_far_keeps_its_gradient_and_what_trails_by_far_its_loss():
    query = torch.tensor([[1.0]], requires_grad=True)
    for scores, target, loss in (([0.0, 90.0], 1, 0.0), ([0.0, 3e4], 0, 3e4), ([-5e4, -5e4], 0, math.log(2))):
        vectors = torch.tensor(scores)[:, None].requires_grad_()
        expected = run(query.double(), vectors.double(), torch.tensor([target]), torch.ones(1), "reference")
        got = run(query, vectors, torch.tensor([target]), torch.ones(1), "blocked")
        assert got[0].item() == pytest.approx(loss, rel=1e-6, abs=1e-12)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-12)


def test_no_more_than_a_block_of_logits_is_made(small_blocks):
    made = []
    query, vectors, *_ = case(100, 16, 3)
    for rows, logits in blocked._blocks(query.detach(), vectors.detach()):
        made.append((rows.start, rows.stop, logits.numel()))
    assert [lo for lo, _, _ in made] == list(range(0, 100, 2)) and made[-1][1] == 100
    assert max(numel for _, _, numel in made) == 32


def test_without_gradients_none_are_made():
    query, vectors, target, weight = case(9, 7, 5)
    with torch.no_grad():
        alone = full_softmax_loss(query, vectors, target, weight)
    assert not alone.requires_grad and torch.equal(alone, full_softmax_loss(query, vectors, target, weight).detach())
    assert [t.numel() for t in torch.ops.gr.full_softmax(query, vectors, target, weight, False)] == [1, 0, 0]


def test_the_registered_op_keeps_torchs_rules_and_compiles_whole(small_blocks):
    query, vectors, target, weight = case(9, 7, 5, torch.float32)
    for gradients in (True, False):
        arguments = (query.detach(), vectors.detach(), target, weight, gradients)
        torch.library.opcheck(torch.ops.gr.full_softmax.default, arguments)
    whole = torch.compile(full_softmax_loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(whole(query, vectors, target, weight), (query, vectors))
    wanted = torch.autograd.grad(full_softmax_loss(query, vectors, target, weight), (query, vectors))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_finite_differences(small_blocks):
    query, vectors, *rest = case(5, 13, 3)
    assert torch.autograd.gradcheck(lambda q, v: full_softmax_loss(q, v, *rest), (query, vectors))


def test_one_side_alone_may_want_a_gradient():
    query, vectors, *rest = case(5, 13, 3)
    both = torch.autograd.grad(full_softmax_loss(query, vectors, *rest), (query, vectors))
    assert torch.equal(torch.autograd.grad(full_softmax_loss(query, vectors.detach(), *rest), query)[0], both[0])
    assert torch.equal(torch.autograd.grad(full_softmax_loss(query.detach(), vectors, *rest), vectors)[0], both[1])


def test_a_second_derivative_is_refused_and_not_wrong():
    query, *rest = case(3, 4, 2)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(full_softmax_loss(query, *rest), query, create_graph=True)


def test_what_is_not_a_number_stays_so():
    query, *rest = case(3, 4, 2, torch.float32)
    with torch.no_grad():
        query[1, 0] = math.nan
    assert torch.isnan(full_softmax_loss(query, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3)}, r"query must be a float matrix, got \(3,\)"),
        ({"vectors": torch.zeros(4, 3)}, r"vectors must have .* width and dtype of query \(2, torch.float32\)"),
        ({"vectors": torch.zeros(4, 2, dtype=torch.float64)}, "vectors must have .* width and dtype of query"),
        ({"vectors": torch.zeros(0, 2)}, "vectors must have at least one row"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must be \(3,\) int64, got \(2,\)"),
        ({"target": torch.zeros(3)}, "target must be .* int64, got .* torch.float32"),
        ({"target": torch.tensor([0, 4, 0])}, "target must lie in 0..3, got 0 to 4"),
        ({"target": torch.tensor([0, -1, 0])}, "target must lie in 0..3, got -1 to 0"),
        ({"weight": torch.zeros(2)}, r"weight must be \(3,\) floats, got \(2,\)"),
        ({"weight": torch.zeros(3, dtype=torch.int64)}, r"weight must be \(3,\) floats, got .* torch.int64"),
        ({"backend": "fast"}, "backend must be one of auto, reference, blocked, got 'fast'"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = {"query": torch.zeros(3, 2), "vectors": torch.zeros(4, 2), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        full_softmax_loss(**(arguments | {"weight": torch.ones(3)} | change))
