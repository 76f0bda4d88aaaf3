"""Metrics against their slow definition: the mean over every place that a tied target can take."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from gr.errors import UserError
from gr.evaluation.metrics import estimate, metric_names, per_target, summarise
from gr.evaluation.ranking import Ranks


def make_ranks(better, tied, user=None) -> Ranks:
    better, tied = np.asarray(better), np.asarray(tied)
    user = np.arange(len(better)) if user is None else np.asarray(user)
    zeros = np.zeros_like(better)
    return Ranks(user, zeros + 1, zeros, better, tied, zeros + 10_000, 10_000)


def slow(better: int, tied: int, metric: str) -> float:
    values = []
    for rank in range(better + 1, better + tied + 2):
        if metric == "mrr":
            values.append(1.0 / rank)
        else:
            name, k = metric.split("@")
            values.append((1.0 if name == "hr" else 1.0 / np.log2(rank + 1)) if rank <= int(k) else 0.0)
    return float(np.mean(values))


@pytest.mark.parametrize("metric", ["hr@1", "hr@5", "hr@10", "ndcg@1", "ndcg@10", "ndcg@50", "mrr"])
def test_each_metric_is_its_mean_over_the_order_of_ties(metric):
    pairs = [(b, t) for b in (0, 1, 4, 9, 10, 49, 5000) for t in (0, 1, 2, 9, 60, 3000)]
    ranks = make_ranks(*zip(*pairs, strict=True))
    expected = [slow(b, t, metric) for b, t in pairs]
    np.testing.assert_allclose(per_target(ranks, metric), expected, rtol=1e-9, atol=1e-15)


def test_an_untied_first_place_is_worth_one():
    for name in metric_names():
        assert per_target(make_ranks([0], [0]), name).tolist() == [1.0]


def test_standard_error_of_independent_targets_is_the_textbook_one():
    values = np.random.default_rng(0).random(200)
    result = estimate(values, np.arange(200))
    assert result.se == pytest.approx(values.std(ddof=1) / np.sqrt(200))
    # In the middle of [0, 1] the score interval is the normal one but for terms of 1 / n.
    assert (result.low, result.high) == (
        pytest.approx(result.mean - 1.96 * result.se, abs=1e-3),
        pytest.approx(result.mean + 1.96 * result.se, abs=1e-3),
    )


@pytest.mark.parametrize(("hits", "n"), [(0, 40), (40, 40), (1, 7), (3, 1000), (500, 1000)])
def test_the_interval_of_a_hit_rate_without_ties_is_wilsons(hits, n):
    result = estimate(np.arange(n) < hits, np.arange(n))
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert (result.low, result.high) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    assert 0.0 <= result.low < result.high <= 1.0


def test_equal_scores_do_not_make_an_interval_of_no_width():
    for value in (0.0, 0.1, 1.0):
        result = estimate(np.full(30, value), np.arange(30))
        assert result.low <= value <= result.high and result.high - result.low > 0.05


def test_intervals_of_small_samples_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [
        found.low <= 0.05 <= found.high
        for found in (estimate((rng.random(60) < 0.05).astype(float), np.arange(60)) for _ in range(2000))
    ]
    assert 0.93 < np.mean(covered) < 0.99  # the normal interval covers 0.81 here: no hit gives it no width


def test_targets_of_one_user_do_not_count_as_independent():
    values = np.random.default_rng(0).random(100)
    once = estimate(values, np.arange(100))
    tripled = estimate(np.repeat(values, 3), np.repeat(np.arange(100), 3))
    assert tripled.se == pytest.approx(once.se)


def test_one_target_has_the_widest_interval():
    result = summarise(make_ranks([0], [0]))["hr@10"]
    assert (result.mean, result.se, result.low, result.high) == (1.0, 0.5, pytest.approx(0.2065, abs=1e-4), 1.0)


@pytest.mark.parametrize("name", ["recall@10", "hr", "ndcg@0", "hr@-1", "mrr@10"])
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(UserError, match="it must be hr@K, ndcg@K or mrr"):
        per_target(make_ranks([0], [0]), name)
