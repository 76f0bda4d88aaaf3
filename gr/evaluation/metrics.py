"""HR@K, NDCG@K and MRR, as expectations over a uniformly random order of tied items.

With b better and t tied items the target's rank is uniform on b + 1 .. b + t + 1, hence, with m = t + 1::

    HR@K   = clip(K - b, 0, m) / m
    NDCG@K = sum over r = b+1 .. min(b+m, K) of 1 / log2(r + 1), over m    (one relevant item: ideal DCG is 1)
    MRR    = (H(b + m) - H(b)) / m                                         (H: harmonic numbers)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

from gr.errors import UserError
from gr.evaluation.ranking import Ranks

KS = (1, 5, 10, 50)
Z = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Estimate:
    """A mean over ``num`` users with its standard error and 95 % interval (Wilson's, see ``wilson``)."""

    mean: float
    se: float
    low: float
    high: float
    num: int

    def to_dict(self) -> dict[str, float]:
        """Plain data for ``results.json``."""
        return {"mean": self.mean, "se": self.se, "low": self.low, "high": self.high}


def hit_rate(ranks: Ranks, k: int) -> np.ndarray:
    """(n,) float64 probability that the target is among the first k."""
    return np.clip((k - ranks.better) / (ranks.tied + 1.0), 0.0, 1.0)


def ndcg(ranks: Ranks, k: int) -> np.ndarray:
    """(n,) float64 expected NDCG@k."""
    gain = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(1, k + 1) + 1.0))])
    first = np.minimum(ranks.better, k)
    last = np.minimum(ranks.better + ranks.tied + 1, k)
    return (gain[last] - gain[first]) / (ranks.tied + 1.0)


def reciprocal_rank(ranks: Ranks) -> np.ndarray:
    """(n,) float64 expected 1 / rank."""
    b, m = ranks.better.astype(np.float64), ranks.tied + 1.0
    # H(b + m) - H(b); the digamma difference cancels for m = 1, where the answer is plain.
    return np.where(m == 1.0, 1.0 / (b + 1.0), (digamma(b + m + 1.0) - digamma(b + 1.0)) / m)


def per_target(ranks: Ranks, metric: str) -> np.ndarray:
    """(n,) float64 of a metric by name: ``hr@K``, ``ndcg@K`` or ``mrr``."""
    match = re.fullmatch(r"(hr|ndcg)@([1-9][0-9]*)", metric)
    if match:
        return (hit_rate if match[1] == "hr" else ndcg)(ranks, int(match[2]))
    if metric == "mrr":
        return reciprocal_rank(ranks)
    raise UserError(f"metric {metric!r} is unknown; it must be hr@K, ndcg@K or mrr")


def metric_names(ks: tuple[int, ...] = KS) -> list[str]:
    """hr@K for every K, ndcg@K for every K, mrr."""
    return [f"hr@{k}" for k in ks] + [f"ndcg@{k}" for k in ks] + ["mrr"]


def estimate(values: np.ndarray, user: np.ndarray) -> Estimate:
    """Mean over targets; targets of one user count as one draw in the standard error.

    Args:
        values: (n,) of a metric whose range is [0, 1].
        user: (n,) whose target it is.
    """
    mean = float(values.mean())
    _, inverse = np.unique(user, return_inverse=True)
    residual = np.bincount(inverse, weights=values - mean)
    if len(residual) < 2:
        se = 0.5  # one user says nothing of the spread: the widest that [0, 1] allows
    else:
        se = float(np.sqrt(len(residual) / (len(residual) - 1) * np.square(residual).sum()) / len(values))
    return Estimate(mean, se, *wilson(mean, se, len(residual)), len(residual))


def wilson(mean: float, se: float, num: int) -> tuple[float, float]:
    """95 % score interval (Wilson 1927) of a mean of values in [0, 1].

    The variance is taken to move with the mean as p (1 - p) does, so that the interval stays inside [0, 1] and has
    a width at 0 hits of n, too. With one target a user and no ties HR@K is a proportion, and this is its textbook
    interval. For graded values (NDCG, MRR, ties) and for several targets a user, n is the number of 0/1 draws that
    would have the same standard error (the effective number of survey statistics); far from 0 and 1 this is the normal
    interval. Where the values show no spread at all, n is the number of users.

    Args:
        mean: In [0, 1].
        se: Its standard error.
        num: Users.
    """
    mean = min(max(mean, 0.0), 1.0)  # a mean of ones may exceed 1 in the last bit
    spread = mean * (1.0 - mean)
    n = 1.0 + spread / se**2 if se > 1e-12 else float(num)  # smaller ones are rounding
    square = Z**2
    centre = (mean + square / (2.0 * n)) / (1.0 + square / n)
    half = Z / (1.0 + square / n) * (spread / n + square / (4.0 * n**2)) ** 0.5
    # At 0 and 1 the interval ends there; rounding must not push it past.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def summarise(ranks: Ranks, ks: tuple[int, ...] = KS) -> dict[str, Estimate]:
    """Every metric of ``metric_names`` with its uncertainty."""
    return {name: estimate(per_target(ranks, name), ranks.user) for name in metric_names(ks)}


def means(ranks: Ranks, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """The means alone, as the training log and early stopping want them."""
    return {name: float(per_target(ranks, name).mean()) for name in metric_names(ks)}
