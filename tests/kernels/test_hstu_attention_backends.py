"""Every fast backend of HSTU attention against the definition in fp64: all pairs of options, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.kernels.hstu_attention import Mask, RelativeBias, choose_backend, hstu_attention, library, native
from hstu_cases import CASES, by_name, compare, leaves, plain, run

FAST = ["cpu", *(["native"] if native.library() else [])]
BACKENDS = ["reference", *FAST]
DTYPES = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if (backend, dtype) != ("native", torch.float64)
]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_as_exact_as_the_definition_in_the_same_dtype(case, backend, dtype):
    compare(case, dtype, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.id)
def test_it_is_so_with_longer_rows_and_wider_heads(case, backend):
    for seed in range(3):
        compare(case, torch.float32, backend, seed, longest=150, batch=5, width=9)


@given(st.sampled_from(CASES), st.integers(3, 60), st.integers(3, 7), st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_rows_and_widths_give_the_definition(case, longest, batch, seed, width):
    arguments = case.arguments(torch.float64, seed, longest=longest, batch=batch, width=width)
    expected, gradients = run(arguments, backend="reference")
    low = case.arguments(torch.float32, seed, longest=longest, batch=batch, width=width)
    for backend in FAST:
        out, found = run(low, backend=backend)
        for name, truth in {"out": expected, **gradients}.items():
            got = (out if name == "out" else found[name]).detach().double()
            scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
            torch.testing.assert_close(got, truth.detach(), rtol=0, atol=3e-5 * scale + 1e-30, msg=name)


@pytest.mark.parametrize("backend", FAST)
def test_same_bits_every_time_whatever_the_batch_mates_and_threads(backend):
    arguments = plain(dtype=torch.float32)
    one = run(arguments, backend=backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if backend == "native" else threads)  # torch's own products may differ by threads
        two = run(arguments, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][n], two[1][n]) for n in one[1])
    alone = {**arguments, **{n: arguments[n][4:11] for n in "qkv"}, "q_offsets": torch.tensor([0, 7])}
    bias = arguments["bias"]
    alone["bias"] = RelativeBias(
        position_table=bias.position_table,
        time_table=bias.time_table,
        key_times=bias.key_times[4:11],
        query_times=bias.query_times[4:11],
    )
    torch.testing.assert_close(hstu_attention(**alone, backend=backend), one[0][4:11])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4, 1e30])
def test_large_scores_of_either_sign_give_the_definition(backend, size):
    offsets, ones = torch.tensor([0, 2]), {"max_seq_len": 2, "divisor": 1.0, "alpha": 1.0}
    for sign in (1.0, -1.0):
        q, k = torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[sign * size]], [[0.5]]])
        leaves = [t.requires_grad_() for t in (q, k, torch.tensor([[[1.0]], [[2.0]]]))]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        out = hstu_attention(*leaves, offsets, **ones, backend=backend)
        expected = hstu_attention(*wide, offsets, **ones, backend="reference")
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-30)
        for one, other in zip(
            *(torch.autograd.grad(x[0].sum(), y) for x, y in ((out, leaves), (expected, wide))), strict=True
        ):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_takes_no_part(backend, dtype):
    expected = by_name(plain(dtype=torch.float32), backend)
    arguments = plain(dtype=torch.float32)
    torch.set_default_dtype(dtype)
    try:
        found = by_name(arguments, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", FAST)
def test_a_group_may_be_larger_than_all_targets(backend, causal):
    mask = Mask(causal=causal, num_targets=torch.tensor([2, 0, 3, 1, 7]), target_group=2**63 - 1)
    arguments = plain(dtype=torch.float32) | {"mask": mask}
    torch.testing.assert_close(
        hstu_attention(**arguments, backend=backend), hstu_attention(**arguments, backend="reference")
    )


@pytest.mark.parametrize("backend", FAST)
def test_an_overflowing_score_that_is_masked_contributes_nothing(backend):
    arguments = plain(dtype=torch.float32)
    with torch.no_grad():
        arguments["q"][2], arguments["k"][3] = 1e20, 1e20  # the last token of the first row: not seen by the third
    out, gradients = run(arguments, backend=backend)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case.id)
def test_the_registered_op_keeps_torchs_rules(case, backend):
    calls = []
    original = library._attention
    library._attention = lambda *args: calls.append(args) or original(*args)
    try:
        hstu_attention(**case.arguments(torch.float32), backend=backend)
    finally:
        library._attention = original
    torch.library.opcheck(torch.ops.gr.hstu_attention.default, calls[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[::6], ids=lambda case: case.id)
def test_a_model_around_it_compiles_whole(case, backend):
    arguments = case.arguments(torch.float32)

    def layer(q: torch.Tensor) -> torch.Tensor:
        return hstu_attention(**{**arguments, "q": q * 2}, backend=backend).sin()

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = list(leaves(arguments).values())
    expected, got = layer(arguments["q"]), compiled(arguments["q"])
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(x.sum(), wanted) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_backend_is_chosen_by_argument_then_environment_then_machine(monkeypatch):
    monkeypatch.delenv("GR_HSTU_BACKEND", raising=False)
    best = "native" if native.library() else "cpu"
    assert choose_backend() == best and choose_backend(dtype=torch.float64) == "cpu"
    assert choose_backend(device="meta") == "reference"
    monkeypatch.setenv("GR_NATIVE", "0")
    assert choose_backend() == "cpu"
    monkeypatch.setenv("GR_HSTU_BACKEND", "reference")
    assert choose_backend() == "reference" and choose_backend("cpu") == "cpu"


def test_a_backend_that_cannot_run_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="^backend must be auto, triton or reference on cuda, got 'cpu'"):
        choose_backend("cpu", "cuda")
    with pytest.raises(ValueError, match="^backend must be auto, cpu or reference for float64, got 'native'"):
        hstu_attention(**plain(), backend="native")
    monkeypatch.setenv("GR_NATIVE", "0")
    with pytest.raises(ValueError, match="^backend must be auto, cpu or reference where nothing can be compiled"):
        choose_backend("native")
    monkeypatch.setenv("GR_HSTU_BACKEND", "fast")
    with pytest.raises(ValueError, match="^the environment variable GR_HSTU_BACKEND must be one of auto, reference, c"):
        hstu_attention(**plain())
