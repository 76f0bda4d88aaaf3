"""Sampled logits and their softmax loss: every backend against the definitions in fp64, gradients included."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.kernels.sampled_logits import native, sampled_logits, sampled_softmax_loss

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not native.available(), reason="no C++ compiler, or GR_NATIVE is 0")
)
fast_backends = pytest.mark.parametrize("backend", ["cpu", NATIVE])


def case(s: int, r: int, u: int, d: int, dtype=torch.float64, integers=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    leaf = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    return leaf(s, d), leaf(u, d), torch.randint(u, (s, r), generator=g).to(integers)


def run(query, vectors, index, backend):
    return derive(sampled_logits(query, vectors, index, backend=backend), query, vectors)


def derive(out, *leaves):
    """The output, and the gradients of its product with fixed numbers."""
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))


def loss_case(s, r, u, d, dtype=torch.float64, integers=torch.int64, *, corrected=False, shared=False):
    query, vectors, index = case(s, r, u, d, dtype, integers)
    g = torch.Generator().manual_seed(2)
    positive = torch.randn(s, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    options = {"collision": torch.rand(s, r, generator=g) < 0.2}
    if corrected:
        options["log_q"] = torch.rand(*((r,) if shared else (s, r)), generator=g) - 2
        options["positive_log_q"] = torch.rand(s, generator=g) - 2
    return (query, positive, vectors), index, options


def run_loss(leaves, index, options, backend):
    query, positive, vectors = leaves
    return derive(sampled_softmax_loss(query, positive, vectors, index, **options, backend=backend), *leaves)


def assert_as_exact(exact, low, got, slack=4.0):
    """``got`` errs no more than the definition does in the same dtype (twice as much, or some roundings)."""
    for place, (truth, definition, found) in enumerate(zip(exact, low, got, strict=True)):
        assert found.dtype == definition.dtype
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        worst = float((found - truth).abs().max()) if truth.numel() else 0.0
        erring = float((definition - truth).abs().max()) if truth.numel() else 0.0
        assert worst <= max(2 * erring, slack * torch.finfo(found.dtype).eps * scale), place


@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_definition_is_the_inner_products_and_the_cpu_form_equals_it(s, r, u, d, seed):
    query, vectors, index = case(s, r, u, d, seed=seed)
    expected = run(query, vectors, index, "reference")
    q, v = query.detach(), vectors.detach()
    slow = [[float(q[i] @ v[j]) for j in row] for i, row in enumerate(index.tolist())]
    torch.testing.assert_close(expected[0], torch.tensor(slow, dtype=torch.float64).view(s, r))
    for one, other in zip(run(query, vectors, index, "cpu"), expected, strict=True):
        torch.testing.assert_close(one, other)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("u", [30, 40_000])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_a_fast_form_is_as_exact_as_the_definition_in_the_same_dtype(dtype, u, integers, backend):
    exact = run(*case(40, 17, u, 9, integers=integers), "reference")
    low = run(*case(40, 17, u, 9, dtype, integers), "reference")
    assert_as_exact(exact, low, run(*case(40, 17, u, 9, dtype, integers), backend))


@fast_backends
@pytest.mark.parametrize("d", [1, 7, 8, 50, 64, 65, 129])
@pytest.mark.parametrize(("s", "r", "u"), [(0, 3, 4), (5, 0, 4), (1, 1, 1), (11, 37, 5), (6, 8, 300), (70, 128, 90)])
def test_any_shape_is_right(s, r, u, d, backend):
    exact = run(*case(s, r, u, d), "reference")
    low = run(*case(s, r, u, d, torch.float32), "reference")
    assert_as_exact(exact, low, run(*case(s, r, u, d, torch.float32), backend), slack=16)


@fast_backends
@pytest.mark.parametrize("d", [1, 8, 50, 129])
@pytest.mark.parametrize(("s", "r", "u"), [(0, 3, 4), (5, 0, 4), (1, 1, 1), (11, 37, 5), (70, 128, 90)])
@pytest.mark.parametrize(("corrected", "shared"), [(False, False), (True, False), (True, True)])
def test_the_loss_is_its_definition_in_any_shape(s, r, u, d, corrected, shared, backend):
    options = {"corrected": corrected, "shared": shared}
    exact = run_loss(*loss_case(s, r, u, d, **options), "reference")
    low = run_loss(*loss_case(s, r, u, d, torch.float32, **options), "reference")
    got = run_loss(*loss_case(s, r, u, d, torch.float32, torch.int32, **options), backend)
    assert_as_exact(exact, low, got, slack=16)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_is_made_in_float32(dtype, backend):
    leaves, index, options = loss_case(40, 17, 30, 9, dtype)
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    loss, *gradients = run_loss(leaves, index, options, backend)
    expected, *slow = run_loss(wide, index, options, "reference")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, slow, strict=True):
        assert gradient.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), other, rtol=2 * eps, atol=eps * float(other.abs().max()))


@pytest.mark.parametrize("backend", ["reference", "cpu", NATIVE])
def test_the_loss_of_one_position_is_minus_the_log_of_its_share(backend):
    own, others = 0.3, [0.1, -0.7, 2.0]
    loss = sampled_softmax_loss(
        torch.tensor([[1.0]]),
        torch.tensor([[own]]),
        torch.tensor(others)[:, None],
        torch.tensor([[0, 1, 2, 2]]),
        collision=torch.tensor([[False, False, True, False]]),
        log_q=torch.tensor([0.5, 0.25, 9.0, 1.0]),
        positive_log_q=torch.tensor([0.125]),
        backend=backend,
    )
    logits = [own - 0.125, others[0] - 0.5, others[1] - 0.25, others[2] - 1.0]
    assert loss.item() == pytest.approx(math.log(sum(map(math.exp, logits))) - logits[0], rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", NATIVE])
@pytest.mark.parametrize("gap", [-300.0, -90.0, -20.0, 0.0, 20.0, 60.0, 300.0])
def test_neither_a_large_nor_a_small_loss_is_lost(gap, backend):
    """log(1 + 3 e^gap), which in float32 is 0 below -103 only."""
    query = torch.ones(1, 1, requires_grad=True)
    index = torch.zeros(1, 3, dtype=torch.int64)
    loss = sampled_softmax_loss(query, torch.full((1, 1), -gap), torch.zeros(1, 1), index, backend=backend)
    expected = math.log1p(3 * math.exp(gap)) if gap < 0 else gap + math.log(3 + math.exp(-gap))
    # Below e^-87 the native form gives 0.
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-36)
    (slope,) = torch.autograd.grad(loss.sum(), query)
    assert slope.item() == pytest.approx(gap * 3 * math.exp(gap) / (1 + 3 * math.exp(gap)), rel=1e-5, abs=1e-33)


@pytest.mark.parametrize("backend", ["reference", "cpu", NATIVE])
def test_a_position_of_collisions_only_loses_nothing(backend):
    leaves, index, _ = loss_case(3, 5, 4, 9, torch.float32)
    loss, *gradients = run_loss(leaves, index, {"collision": torch.ones(3, 5, dtype=torch.bool)}, backend)
    assert not loss.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", ["reference", "cpu", NATIVE])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_stays_so(which, backend):
    leaves, index, options = loss_case(9, 11, 1, 9, torch.float32)
    with torch.no_grad():
        leaves[which][0, 3] = torch.nan
    assert run_loss(leaves, index, options, backend)[0][0].isnan()


@fast_backends
def test_any_number_of_threads_gives_the_same_bits(backend):
    before = torch.get_num_threads()
    arguments = case(301, 40, 70, 50, torch.float32)
    losses = loss_case(301, 40, 70, 50, torch.float32)
    try:
        found = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            found.append((*run(*arguments, backend), *run_loss(*losses, backend)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@fast_backends
def test_strided_tensors_are_read_as_they_are(backend):
    leaves, index, options = loss_case(7, 6, 12, 10, torch.float32, corrected=True)
    expected = run_loss(leaves, index, options, backend)
    flipped = tuple(leaf.detach().T.contiguous().T.requires_grad_() for leaf in leaves)
    turned = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in options.items()}
    for one, other in zip(run_loss(flipped, index.T.contiguous().T, turned, backend), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_finite_differences():
    query, vectors, index = case(3, 4, 5, 2)
    leaves, drawn, options = loss_case(3, 4, 5, 2, corrected=True)
    for backend in ("reference", "cpu"):
        assert torch.autograd.gradcheck(
            lambda q, v, b=backend: sampled_logits(q, v, index, backend=b), (query, vectors)
        )
        assert torch.autograd.gradcheck(
            lambda q, p, v, b=backend: sampled_softmax_loss(q, p, v, drawn, **options, backend=b), leaves
        )


@fast_backends
def test_the_registered_ops_keep_torchs_rules_and_compile_whole(backend):
    query, vectors, index = case(3, 4, 5, 2, torch.float32)
    torch.library.opcheck(torch.ops.gr.sampled_logits.default, (query, vectors, index, backend))
    compiled = torch.compile(lambda q: sampled_logits(q, vectors, index).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), sampled_logits(query, vectors, index).sin())

    leaves, index, options = loss_case(3, 4, 5, 2, torch.float32, corrected=True)
    torch.library.opcheck(torch.ops.gr.sampled_softmax.default, (*leaves, index, *options.values(), backend))
    torch.library.opcheck(torch.ops.gr.sampled_combine.default, (torch.randn(3, 4), vectors.detach(), index, backend))
    torch.library.opcheck(torch.ops.gr.sampled_spread.default, (torch.randn(3, 4), query.detach(), index, 5, backend))
    loss = lambda q, p, v: sampled_softmax_loss(q, p, v, index, **options, backend=backend)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(derive(compiled(*leaves), *leaves), derive(loss(*leaves), *leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_without_the_native_form_auto_is_the_torch_form():
    code = (
        "import torch\n"
        "from gr.kernels.sampled_logits import cpu, native, sampled_logits\n"
        "assert not native.available()\n"
        "q, v, i = torch.randn(3, 9), torch.randn(5, 9), torch.randint(5, (3, 4))\n"
        "assert torch.equal(sampled_logits(q, v, i), cpu.scores(q, v, i))\n"
        "try:\n    sampled_logits(q, v, i, backend='native')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"GR_NATIVE": "0"}, capture_output=True, text=True
    )
    assert done.stdout.startswith("backend must be auto, reference or cpu"), done.stderr


GOOD = {"query": torch.randn(3, 2), "vectors": torch.randn(5, 2), "index": torch.zeros(3, 4, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(3)}, "query must be a float matrix"),
        ({"vectors": torch.randn(5, 3)}, "vectors must have the width and dtype of query"),
        ({"vectors": torch.randn(5, 2, dtype=torch.float64)}, "vectors must have the width and dtype of query"),
        ({"index": torch.zeros(2, 4, dtype=torch.int64)}, "index must be (3, R) integers"),
        ({"index": torch.zeros(3, 4)}, "index must be (3, R) integers"),
        ({"backend": "cuda"}, "backend must be one of auto"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    for operator in (sampled_logits, lambda **given: sampled_softmax_loss(positive=torch.randn(3, 2), **given)):
        with pytest.raises(ValueError) as caught:
            operator(**(GOOD | change))
        assert str(caught.value).startswith(message)


@fast_backends
@pytest.mark.parametrize("wrong", [5, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_a_draw_that_is_no_vector_is_refused(wrong, integers, backend):
    index = torch.zeros(3, 4, dtype=integers)
    index[1, 3] = wrong
    given = GOOD | {"index": index, "backend": backend}
    low, high = min(wrong, 0), max(wrong, 0)
    for operator in (sampled_logits, lambda **given: sampled_softmax_loss(positive=torch.randn(3, 2), **given)):
        with pytest.raises(ValueError) as caught:
            operator(**given)
        assert str(caught.value) == f"index must lie in 0..4, got {low}..{high}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": torch.randn(3, 3)}, "positive must be float (3, 2)"),
        ({"collision": torch.zeros(3, 4)}, "collision must be bool (3, 4)"),
        ({"collision": torch.zeros(3, 1, dtype=torch.bool)}, "collision must be bool (3, 4)"),
        ({"log_q": torch.zeros(3)}, "log_q must be (4,) or (3, 4)"),
        ({"positive_log_q": torch.zeros(4)}, "positive_log_q must be (3,)"),
        ({"log_q": torch.zeros(4, device="meta")}, "log_q must be on the device of query"),
    ],
)
def test_bad_arguments_of_the_loss_are_refused_by_name(change, message):
    with pytest.raises(ValueError) as caught:
        sampled_softmax_loss(**(GOOD | {"positive": torch.randn(3, 2)} | change))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_a_second_derivative_of_the_loss_is_refused_and_not_wrong(backend):
    from gr.kernels.sampled_logits import sampled_softmax_loss

    query, vectors, index = case(3, 4, 5, 2, torch.float32)
    loss = sampled_softmax_loss(query, torch.ones(3, 2), vectors, index, backend=backend).sum()
    with pytest.raises(RuntimeError, match="sampled_softmax_loss has no second derivative on a CPU"):
        torch.autograd.grad(loss, query, create_graph=True)
