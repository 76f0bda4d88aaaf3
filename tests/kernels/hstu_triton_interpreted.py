"""Triton kernels of HSTU attention in Triton's interpreter, on the CPU, against the definition in fp64.

Not collected by name: Triton decides at its first import whether it interprets, so test_hstu_attention_triton.py runs
this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gr.kernels.hstu_attention import Mask, hstu_attention, library
from hstu_cases import CASES, compare, plain, run

RULES = ("test_schema", "test_autograd_registration", "test_faketensor")  # the other backends' tests have the slow ones


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody writes holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_as_exact_as_the_definition_in_the_same_dtype(case, dtype):
    compare(case, dtype, "triton")


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.id)
def test_it_is_so_with_several_tiles_a_row_and_wider_heads(case):
    compare(case, torch.float32, "triton", longest=101, batch=4, width=9)


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_so_with_a_window_alone_which_ends_the_walk_over_queries(causal, form):
    alone = {"causal": causal, "form": form, "window": (2, None), "contextual": False, "targets": None}
    alone |= {"position": None, "time": None}  # q, k and v show where the walk ends
    compare(replace(CASES[0], **alone), torch.float32, "triton", longest=101, batch=4, width=9)


def test_strided_arguments_give_what_dense_ones_do():
    arguments = plain(dtype=torch.float32)
    expected, gradients = run(arguments, backend="triton")
    packed = torch.cat([arguments[name].detach() for name in "qkv"], dim=2)
    for name, part in zip("qkv", packed.split([arguments[n].shape[2] for n in "qkv"], dim=2), strict=True):
        arguments[name] = part.requires_grad_()
        assert not part.is_contiguous()
    out, found = run(arguments, backend="triton")
    assert torch.equal(out, expected) and all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_no_tokens_at_all_give_nothing():
    arguments = plain(dtype=torch.float32) | {"bias": None, "q_offsets": torch.zeros(3, dtype=torch.int64)}
    arguments |= {name: arguments[name].detach()[:0].requires_grad_() for name in "qkv"}
    out, found = run(arguments, backend="triton")
    assert out.shape == (0, 2, 4) and all(not gradient.numel() for gradient in found.values())


def test_an_overflowing_score_that_is_masked_contributes_nothing():
    arguments = plain(dtype=torch.float32)
    with torch.no_grad():
        arguments["q"][2], arguments["k"][3] = 1e20, 1e20  # the last token of the first row: not seen by the third
    out, gradients = run(arguments, backend="triton")
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("causal", [True, False])
def test_a_group_may_be_larger_than_all_targets(causal):
    mask = Mask(causal=causal, num_targets=torch.tensor([2, 0, 3, 1, 7]), target_group=2**63 - 1)
    arguments = plain(dtype=torch.float32) | {"mask": mask}
    torch.testing.assert_close(
        hstu_attention(**arguments, backend="triton"), hstu_attention(**arguments, backend="reference")
    )


def test_the_registered_op_keeps_torchs_rules():
    calls = []
    original = library._attention
    library._attention = lambda *args: calls.append(args) or original(*args)
    try:
        hstu_attention(**plain(dtype=torch.float32), backend="triton")
    finally:
        library._attention = original
    torch.library.opcheck(torch.ops.gr.hstu_attention.default, calls[0], test_utils=RULES)
