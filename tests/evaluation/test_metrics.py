"""Metrics against their slow definition: the mean over every place that a tied target can take."""

from __future__ import annotations

import numpy as np
import pytest

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
    assert (result.low, result.high) == (
        pytest.approx(result.mean - 1.96 * result.se),
        pytest.approx(result.mean + 1.96 * result.se),
    )


def test_targets_of_one_user_do_not_count_as_independent():
    values = np.random.default_rng(0).random(100)
    once = estimate(values, np.arange(100))
    tripled = estimate(np.repeat(values, 3), np.repeat(np.arange(100), 3))
    assert tripled.se == pytest.approx(once.se)


def test_one_target_has_the_widest_interval():
    result = summarise(make_ranks([0], [0]))["hr@10"]
    assert (result.mean, result.se, result.low, result.high) == (1.0, 0.5, pytest.approx(0.02), 1.0)


@pytest.mark.parametrize("name", ["recall@10", "hr", "ndcg@0", "hr@-1", "mrr@10"])
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(UserError, match="it must be hr@K, ndcg@K or mrr"):
        per_target(make_ranks([0], [0]), name)
