"""The paired bootstrap: its p-value under no difference and under a real one, and pairing by target."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gr.errors import UserError
from gr.evaluation.ranking import Ranks
from gr.evaluation.significance import compare, holm, paired_bootstrap


def make_ranks(better: np.ndarray) -> Ranks:
    n = np.arange(len(better))
    return Ranks(n, n + 1, n, better, np.zeros_like(n), np.full_like(n, 100), 100)


def test_p_values_are_about_uniform_when_nothing_differs():
    rng = np.random.default_rng(0)
    pairs = (rng.random((2, 200)) < 0.3 for _ in range(300))
    p = np.array([paired_bootstrap(*pair.astype(float), samples=400, seed=i).p_value for i, pair in enumerate(pairs)])
    # 300 draws: the shares below are within 3 standard errors of 5 % and 50 %, plus the ties of a discrete
    # mean.
    assert 0.01 < (p < 0.05).mean() < 0.09
    assert 0.4 < (p < 0.5).mean() < 0.6


def test_a_clear_difference_has_a_small_p_and_an_interval_off_zero():
    rng = np.random.default_rng(1)
    a, b = rng.random(500) + 0.1, rng.random(500)
    result = paired_bootstrap(a, b, samples=2000)
    assert result.p_value < 0.01 and 0 < result.low < result.difference < result.high
    assert result.difference == pytest.approx((a - b).mean())


def test_the_interval_agrees_with_plain_resampling():
    rng = np.random.default_rng(2)
    gap = rng.choice([-1.0, 0.0, 0.5], 300)
    result = paired_bootstrap(gap, np.zeros(300), samples=4000)
    plain = gap[rng.integers(0, 300, (4000, 300))].mean(1)
    np.testing.assert_allclose([result.low, result.high], np.quantile(plain, [0.025, 0.975]), atol=0.01)


def test_equal_rankings_have_p_one():
    ranks = make_ranks(np.arange(50))
    result = compare(ranks, ranks)
    assert (result.p_value, result.difference, result.low, result.high) == (1.0, 0.0, 0.0, 0.0)


def test_targets_of_one_user_are_resampled_together():
    rng = np.random.default_rng(3)
    gap, zeros = rng.normal(size=40), np.zeros(40)
    once = paired_bootstrap(gap, zeros, np.arange(40))
    tripled = paired_bootstrap(np.repeat(gap, 3), np.zeros(120), np.repeat(np.arange(40), 3))
    assert tripled.num_users == 40
    np.testing.assert_allclose([tripled.low, tripled.high], [once.low, once.high], rtol=1e-9)


def test_the_result_is_fixed_by_its_seed():
    a, b = np.random.default_rng(4).random((2, 100))
    assert paired_bootstrap(a, b, seed=5) == paired_bootstrap(a, b, seed=5)


def test_rankings_of_different_targets_are_refused():
    ranks = make_ranks(np.arange(50))
    with pytest.raises(UserError, match="differ in their targets"):
        compare(ranks, dataclasses.replace(ranks, position=ranks.position + 1))


def test_drawing_users_and_drawing_kinds_of_users_agree():
    gap = np.random.default_rng(6).choice([-0.5, 0.0, 0.25, 1.0], 400)
    kinds = paired_bootstrap(gap, np.zeros(400), samples=4000)
    users = paired_bootstrap(gap + np.arange(400) * 1e-9, np.zeros(400), samples=4000)  # every user a kind
    np.testing.assert_allclose([users.low, users.high], [kinds.low, kinds.high], atol=0.01)


def test_holm_adjusts_as_by_hand():
    # 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.2 * 1, each at least the one before.
    np.testing.assert_allclose(holm([0.2, 0.01, 0.03, 0.02]), [0.2, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
