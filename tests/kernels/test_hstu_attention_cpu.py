"""The torch form of HSTU attention on a CPU: tiles, plans and what they remember."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.kernels.hstu_attention import cpu, cpu_plan, hstu_attention
from hstu_cases import CASES, compare, plain, run


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows are cut into tiles as long ones would be, and nothing is remembered from another test."""
    monkeypatch.setattr(cpu_plan, "TILE_QUERIES", 2)
    monkeypatch.setattr(cpu_plan, "TILE_SCORES", 48)
    monkeypatch.setattr(cpu_plan, "CALL_SCORES", 12)
    cpu_plan.forget()
    yield
    cpu_plan.forget()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_small_tiles_are_as_exact_as_the_definition(case, small_tiles):
    compare(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.id)
def test_so_are_products_in_bfloat16_as_a_processor_with_matrix_units_makes_them(case, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: True)
    compare(case, torch.bfloat16, "cpu", longest=20, width=4)


@given(st.sampled_from(CASES), st.integers(3, 12), st.integers(3, 7), st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_rows_cut_in_any_way_give_the_definition(case, longest, batch, seed, rows):
    arguments = case.arguments(torch.float64, seed, longest=longest, batch=batch)
    expected, gradients = run(arguments, backend="reference")
    kept = cpu_plan.TILE_QUERIES, cpu_plan.TILE_SCORES
    cpu_plan.TILE_QUERIES, cpu_plan.TILE_SCORES = rows, 10 * rows
    try:
        cpu_plan.forget()
        out, found = run(arguments, backend="cpu")
    finally:
        cpu_plan.TILE_QUERIES, cpu_plan.TILE_SCORES = kept
        cpu_plan.forget()
    torch.testing.assert_close(out, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_layers_share_a_plan_and_a_change_in_place_makes_a_new_one():
    cpu_plan.forget()
    arguments = plain()
    run(arguments, backend="cpu")
    (first,) = cpu_plan.remembered()
    run(plain(1) | {n: arguments[n] for n in ("q_offsets", "bias")}, backend="cpu")
    assert cpu_plan.remembered() == [first]
    arguments["bias"].key_times.add_(10**5)
    expected, got = run(arguments, backend="reference"), run(arguments, backend="cpu")
    assert len(cpu_plan.remembered()) == 2
    torch.testing.assert_close(got[0], expected[0])
    for seed in range(5):
        run(plain(seed + 2), backend="cpu")
    assert len(cpu_plan.remembered()) == 2, "memory is that of two batches"


def test_indices_over_the_budget_are_made_anew_and_the_result_is_the_same(monkeypatch):
    expected = run(plain(), backend="cpu")
    monkeypatch.setattr(cpu_plan, "KEPT_BYTES", 1)
    cpu_plan.forget()
    got = run(plain(), backend="cpu")
    assert torch.equal(got[0], expected[0]) and all(torch.equal(got[1][n], expected[1][n]) for n in expected[1])


def test_a_plan_made_in_inference_mode_serves_training():
    cpu_plan.forget()
    arguments = plain()
    with torch.inference_mode():
        hstu_attention(**arguments, backend="cpu")
    expected = run(arguments, backend="reference")
    torch.testing.assert_close(run(arguments, backend="cpu")[0], expected[0])
