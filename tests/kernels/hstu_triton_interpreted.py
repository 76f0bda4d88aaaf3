"""Triton kernels of HSTU attention in Triton's interpreter, on the CPU, against the definition in fp64.

Not collected by name: Triton decides at its first import whether it interprets, so test_hstu_attention_triton.py runs
this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention, library, triton_launch
from gr.kernels.hstu_attention.types import Arguments
from hstu_cases import CASES, compare, plain, run
from hstu_triton_cases import CHOICES, Choice, blocks, check, choices, mended, poisoned, product

RULES = ("test_schema", "test_autograd_registration", "test_faketensor")  # the other backends' tests have the slow ones
FORMS = pytest.mark.parametrize("form", CHOICES["form"])


@pytest.fixture(autouse=True)
def _mended():
    with mended():
        yield


@pytest.mark.parametrize("choice", choices(), ids=lambda choice: choice.id)
def test_it_is_as_exact_as_the_definition_in_the_same_dtype(choice):
    check(choice)


@pytest.mark.slow
@pytest.mark.parametrize("choice", product(), ids=lambda choice: choice.id)
def test_every_mask_with_every_bias(choice):
    check(choice)


@pytest.mark.parametrize("case", CASES[::8], ids=lambda case: case.id)
def test_it_is_so_with_the_shipped_tiles_and_several_of_them_a_row(case):
    with poisoned():
        compare(case, torch.float32, "triton", longest=101, batch=4, width=9)


@FORMS
@pytest.mark.parametrize("dims", [(256, 256), (16, 256), (256, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_so_with_the_widest_heads_and_both_biases(dtype, dims, form):
    case = replace(CASES[1], dims=dims, form="full", position=("shared", "index"), time="per_head")
    check(Choice(case, dtype, 20, 1, (16, 16), form, False))


@FORMS
@pytest.mark.parametrize("longest", [63, 64, 65])
def test_it_is_so_where_rows_just_fill_a_block_or_not(longest, form):
    case = CASES[longest % len(CASES)]
    with blocks(64, 64, packed=128, form=form if case.form == "full" else "split"), poisoned():
        compare(case, torch.float32, "triton", longest=longest, batch=5, width=4)


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_so_with_a_window_alone_which_ends_the_walk_over_queries(causal, form):
    alone = {"causal": causal, "form": form, "window": (2, None), "contextual": False, "targets": None}
    alone |= {"position": None, "time": None}  # q, k and v show where the walk ends
    check(Choice(replace(CASES[0], **alone), torch.float32, 40, 9, (16, 16), "split", False))


@FORMS
def test_the_same_bits_every_time_and_for_all_batch_mates(form):
    arguments = plain(dtype=torch.float32)
    with blocks(16, 16, form=form):
        one, two = (run(arguments, backend="triton", deterministic=True) for _ in range(2))
        bias = arguments["bias"]
        alone = {**arguments, **{n: arguments[n][4:11] for n in "qkv"}, "q_offsets": torch.tensor([0, 7])}
        times = {"key_times": bias.key_times[4:11], "query_times": bias.query_times[4:11]}
        tables = {"position_table": bias.position_table, "time_table": bias.time_table}
        out = hstu_attention(**alone | {"bias": RelativeBias(**tables, **times)}, backend="triton")
    assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][n], two[1][n]) for n in one[1])
    assert torch.equal(out, one[0][4:11]) or form == "packed"  # another place in a packed tile, another order of sums
    torch.testing.assert_close(out, one[0][4:11])


def test_deterministic_sums_of_the_tables_do_not_depend_on_the_order_of_rows():
    """Others do, in the last bits of their float64: here rows come in the opposite order."""
    arguments = plain(dtype=torch.float32)
    offsets, bias = arguments["q_offsets"].tolist(), arguments["bias"]
    spans = [slice(*span) for span in itertools.pairwise(offsets)]

    def turned(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[span] for span in reversed(spans)])

    tables = {n: getattr(bias, n).detach().double().requires_grad_() for n in ("position_table", "time_table")}
    times = {n: getattr(bias, n) for n in ("key_times", "query_times")}
    one = arguments | {"bias": RelativeBias(**tables, **times)}
    other = {n: turned(arguments[n].detach()).requires_grad_() for n in "qkv"}
    other["q_offsets"] = torch.tensor([0, *itertools.accumulate(s.stop - s.start for s in reversed(spans))])
    other["bias"] = RelativeBias(**tables, **{n: turned(t) for n, t in times.items()})
    grad = torch.randn(19, 2, 4, generator=torch.Generator().manual_seed(0))
    grad[4:11] *= 1e-9  # so that 53 bits do not hold every sum

    def gradients(deterministic: bool) -> list[tuple]:
        found = []
        for each, g in ((one, grad), (arguments | other, turned(grad))):
            out = hstu_attention(**each, backend="triton", deterministic=deterministic)
            found.append(torch.autograd.grad(out, list(tables.values()), g))
        return found

    with blocks(16, 16, form="split"):
        fixed, free = gradients(True), gradients(False)
    assert all(torch.equal(*pair) for pair in zip(*fixed, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(*free, strict=True))
    torch.testing.assert_close(fixed, free)


@FORMS
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4, 1e30])
def test_large_scores_of_either_sign_give_the_definition(size, form):
    offsets, ones = torch.tensor([0, 2]), {"max_seq_len": 2, "divisor": 1.0, "alpha": 1.0}
    for sign in (1.0, -1.0):
        q, k = torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[sign * size]], [[0.5]]])
        leaves = [t.requires_grad_() for t in (q, k, torch.tensor([[[1.0]], [[2.0]]]))]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        with blocks(16, 16, form=form):
            out = hstu_attention(*leaves, offsets, **ones, backend="triton")
            got = torch.autograd.grad(out.sum(), leaves)  # the gradient of a sum has strides 0
        expected = hstu_attention(*wide, offsets, **ones, backend="reference")
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-30)
        for one, other in zip(got, torch.autograd.grad(expected.sum(), wide), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-30)


@FORMS
def test_an_overflowing_score_that_is_masked_contributes_nothing(form):
    arguments = plain(dtype=torch.float32)
    with torch.no_grad():
        arguments["q"][2], arguments["k"][3] = 1e20, 1e20  # the last token of the first row: not seen by the third
    with blocks(16, 16, form=form):
        out, gradients = run(arguments, backend="triton")
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("causal", [True, False])
def test_limits_may_be_larger_than_any_row(causal):
    mask = Mask(causal=causal, num_targets=torch.tensor([2, 0, 3, 1, 7]), target_group=2**63 - 1, window=2**62)
    arguments = plain(dtype=torch.float32) | {"mask": mask}
    with blocks(16, 16, form="split"):
        out = hstu_attention(**arguments, backend="triton")
    torch.testing.assert_close(out, hstu_attention(**arguments, backend="reference"))


@FORMS
def test_times_may_lie_an_age_apart(form):
    """Differences beyond 32 bits in some tiles, and all within one second in others."""
    arguments = plain(dtype=torch.float32)
    position = arguments["bias"].position_table
    table = torch.randn(129, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for span in (2**50, 1):
        times = torch.randint(-span, span, (19,), generator=torch.Generator().manual_seed(0))
        far = RelativeBias(position_table=position, time_table=table, key_times=times, query_times=times + 5)
        with blocks(16, 16, form=form):
            got = run(arguments | {"bias": far}, backend="triton")
        expected = run(arguments | {"bias": far}, backend="reference")
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


@FORMS
def test_narrow_times_may_lie_as_far_apart_as_they_can(form):
    """The same bits as of wide times, up to the longest distance that 32 bits are asked to hold."""
    arguments = plain(dtype=torch.float16)
    table = torch.randn(129, generator=torch.Generator().manual_seed(0), requires_grad=True)
    key_times, query_times = torch.randint(2**31 - 1, (2, 19), generator=torch.Generator().manual_seed(0)).sort().values
    key_times[4], query_times[10] = 0, 2**31 - 2  # first and last token of a row
    found = []
    for dtype in (torch.int32, torch.int64):
        times = {"key_times": key_times.to(dtype), "query_times": query_times.to(dtype)}
        with blocks(16, 16, form=form):
            found.append(run(arguments | {"bias": RelativeBias(time_table=table, **times)}, backend="triton"))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[1][1])


def test_strided_arguments_give_what_dense_ones_do():
    arguments = plain(dtype=torch.float32)
    expected, gradients = run(arguments, backend="triton")
    packed = torch.cat([arguments[name].detach() for name in "qkv"], dim=2)
    for name, part in zip("qkv", packed.split([arguments[n].shape[2] for n in "qkv"], dim=2), strict=True):
        arguments[name] = part.requires_grad_()
        assert not part.is_contiguous()
    out, found = run(arguments, backend="triton")
    assert torch.equal(out, expected) and all(torch.equal(found[name], gradients[name]) for name in gradients)


@FORMS
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_rows_without_tokens(lengths, form):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    q, table = torch.zeros(0, 2, 3, requires_grad=True), torch.zeros(5, requires_grad=True)
    rest = {"max_seq_len": 3, "divisor": 1.0, "alpha": 1.0, "bias": RelativeBias(position_table=table)}
    with blocks(16, 16, form=form), poisoned():
        out = hstu_attention(q, q, q, offsets, **rest, backend="triton", deterministic=True)
        (gradient,) = torch.autograd.grad(out.sum(), [table])
    assert out.shape == (0, 2, 3) and not gradient.any()


@FORMS
def test_elements_beyond_31_bits_are_reached_by_wide_strides(form):
    """Memory is asked for, not touched: four tokens 2**30 elements apart, three of them in one row."""
    stride, g = 2**30, torch.Generator().manual_seed(0)
    wide = _untouched(3 * stride + 64)
    tensors = []
    for shift in (0, 16, 32, 48):
        tensors.append(wide.as_strided((4, 1, 16), (stride, 16, 1), shift))
        tensors[-1].copy_(torch.randn(4, 1, 16, generator=g))
    *rows, grad = tensors
    common = {"q_offsets": torch.tensor([0, 1, 4]), "max_seq_len": 3, "divisor": 2.0, "alpha": 1.0}

    def both(grad: torch.Tensor, *rows: torch.Tensor, **more) -> tuple:
        rows = [t.detach().requires_grad_() for t in rows]
        out = hstu_attention(*rows, **common, **more)
        return out, *torch.autograd.grad(out, rows, grad)

    expected = both(*(t.float().contiguous() for t in (grad, *rows)), backend="reference")
    with blocks(16, 16, form=form):
        found = both(grad, *rows, backend="triton")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", ["packed", "split"])  # "atomic" clears all of its float32 dQ
def test_elements_beyond_31_bits_are_read_and_written(form):
    """Only the last three of 2**27 tokens belong to a row: the backend's functions do not look at the others."""
    before, g = 2**27, torch.Generator().manual_seed(0)
    rows = [_untouched((before + 3) * 16).view(before + 3, 1, 16) for _ in range(4)]
    small = [torch.randn(3, 1, 16, generator=g).half() for _ in rows]
    for row, values in zip(rows, small, strict=True):
        row[before:] = values

    def call(rows: list[torch.Tensor], offsets: torch.Tensor) -> Arguments:
        q, k, v = rows
        return Arguments(q=q, k=k, v=v, q_offsets=offsets, max_seq_len=3, divisor=2.0, alpha=1.0, mask=Mask())

    far, near = (torch.tensor([n, n + 3]) for n in (before, 0))
    with blocks(16, 16, form=form):
        outs = [triton_launch.forward(call(r[1:], o)) for r, o in ((rows, far), (small, near))]
        found, expected = (triton_launch.backward(r[0], call(r[1:], o))[:3] for r, o in ((rows, far), (small, near)))
    for one, other in zip((outs[0], *found), (outs[1], *expected), strict=True):
        assert other.any() and torch.equal(one[before:], other)


def _untouched(elements: int) -> torch.Tensor:
    try:
        return torch.empty(elements, dtype=torch.float16)
    except RuntimeError:
        pytest.skip(f"this machine hands out no {2 * elements >> 30} GiB of memory that a test does not touch")


def test_the_registered_op_keeps_torchs_rules():
    calls = []
    original = library._attention
    library._attention = lambda *args: calls.append(args) or original(*args)
    try:
        hstu_attention(**plain(dtype=torch.float32), backend="triton", deterministic=True)
    finally:
        library._attention = original
    torch.library.opcheck(torch.ops.gr.hstu_attention.default, calls[0], test_utils=RULES)
