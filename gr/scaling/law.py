"""L = E + sum_k A_k x_k^-alpha_k fitted to losses: L(N, D) with two axes, L(C) with one. numpy and scipy only.

In logs, with u_k = log x_k - its mean: log L = logsumexp(a_k - alpha_k u_k, e), and the sum (a mean would end the
search early) of Huber terms of its residuals is minimised, delta 1e-3 (Hoffmann et al. 2022, arXiv 2203.15556,
section 3.3). Every start of a grid is judged, the best 24 are refined with the analytic Jacobian: refining all of
them takes minutes and finds the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

DELTA = 1e-3
REFINED = 24
MOST = 5.0  # largest exponent looked for
MAX_EVALUATIONS = 400  # of one refinement; tens are usual


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        floor: E.
        factors: A_k.
        exponents: alpha_k.
        objective: Sum of the Huber terms.
        converged: Whether the search ended by itself.
    """

    floor: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]
    objective: float
    converged: bool = True

    def __call__(self, *axes: np.ndarray | float) -> np.ndarray:
        """Losses at axes such as N and D."""
        terms = (a * np.asarray(x, float) ** -p for a, p, x in zip(self.factors, self.exponents, axes, strict=True))
        return self.floor + sum(terms)


def law_of(raw: dict[str, Any]) -> Law:
    """A law from plain data."""
    return Law(raw["floor"], tuple(raw["factors"]), tuple(raw["exponents"]), raw["objective"], raw["converged"])


def axes_of(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(2, n): N and D of runs."""
    return np.array([[row[name] for row in rows] for name in ("n_encoder", "tokens")])


class _Problem:
    """Residuals in centred logs; a parameter vector is (a_1..k, alpha_1..k, e)."""

    def __init__(self, axes: np.ndarray, loss: np.ndarray) -> None:
        logs = np.log(axes)
        self.mean = logs.mean(axis=1)
        self.logs, self.target = logs - self.mean[:, None], np.log(loss)
        self.k = len(axes)
        low = [-40.0] * self.k + [0.0] * self.k + [-40.0]
        high = [40.0] * self.k + [MOST] * self.k + [self.target.min()]
        self.bounds = (np.array(low), np.array(high))

    def _terms(self, params: np.ndarray) -> np.ndarray:
        """(k + 1, n): the logs of what is summed."""
        rows = [params[i] - params[self.k + i] * self.logs[i] for i in range(self.k)]
        return np.stack([*rows, np.full(self.target.shape, params[-1])])

    def residuals(self, params: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(self._terms(params), axis=0) - self.target

    def jacobian(self, params: np.ndarray) -> np.ndarray:
        """(n, 2 k + 1): a term's share of the sum is its derivative."""
        terms = self._terms(params)
        share = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
        return np.concatenate([share[:-1], -share[:-1] * self.logs, share[-1:]]).T

    def objective(self, params: np.ndarray) -> float:
        return float(self.objectives(params[None])[0])

    def objectives(self, starts: np.ndarray) -> np.ndarray:
        """(m,) for (m, 2 k + 1) parameter vectors at once."""
        k = self.k
        total = np.broadcast_to(starts[:, -1:], (len(starts), self.target.size))
        for i in range(k):
            total = np.logaddexp(total, starts[:, i : i + 1] - starts[:, k + i : k + i + 1] * self.logs[i])
        size = np.abs(total - self.target)
        return np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum(1)

    def refine(self, start: np.ndarray) -> tuple[np.ndarray, bool]:
        low, high = self.bounds
        inside = np.clip(start, low + 1e-9, high - 1e-9)
        found = least_squares(
            self.residuals, inside, self.jacobian, self.bounds, x_scale="jac", loss="huber", f_scale=DELTA,
            ftol=1e-9, xtol=1e-9, gtol=1e-14, max_nfev=MAX_EVALUATIONS,
        )  # fmt: skip
        return found.x, found.status > 0

    def starts(self) -> np.ndarray:
        """(4500, 5) for two axes: sizes of the terms at the centre, exponents, and E below the least loss; (5184, 7) of
        a coarser grid for three."""
        least, fine = self.target.min(), self.k < 3
        sizes = least + np.array([-6.0, -4.0, -3.0, -2.0, -1.0, 0.0] if fine else [-5.0, -3.0, -1.5, 0.0])
        exponents = (0.05, 0.2, 0.5, 1.0, 2.0) if fine else (0.1, 0.4, 1.5)
        floors = least - np.array([0.01, 0.1, 0.3, 1.0, 2.0] if fine else [0.03, 0.3, 1.0])
        return np.array(list(itertools.product(*[sizes] * self.k, *[exponents] * self.k, floors)))

    def law(self, params: np.ndarray, converged: bool) -> Law:
        exponents = params[self.k : 2 * self.k]
        factors = np.exp(params[: self.k] + exponents * self.mean)
        floor, factors, exponents = np.exp(params[-1]), map(float, factors), map(float, exponents)
        return Law(float(floor), tuple(factors), tuple(exponents), self.objective(params), converged)

    def params(self, law: Law) -> np.ndarray:
        exponents = np.array(law.exponents)
        return np.array([*(np.log(law.factors) - exponents * self.mean), *exponents, np.log(law.floor)])


def fit_law(axes: np.ndarray, loss: np.ndarray, start: Law | None = None) -> Law:
    """The law of least objective.

    Args:
        axes: (k, n) positive: N and D, or C.
        loss: (n,) positive.
        start: Refines this one only, as the bootstrap does.
    """
    problem = _Problem(np.asarray(axes, float), np.asarray(loss, float))
    if start is not None:
        return problem.law(*problem.refine(problem.params(start)))
    starts = problem.starts()
    order = np.argsort(problem.objectives(starts), kind="stable")
    found = [problem.refine(params) for params in starts[order[:REFINED]]]
    best = min(problem.objective(params) for params, _ in found)
    # Among ends of one objective, one whose search was not cut short.
    ends = [(not over, i) for i, (params, over) in enumerate(found) if problem.objective(params) <= best * (1 + 1e-6)]
    return problem.law(*found[min(ends)[1]])


def conditioning(axes: np.ndarray, loss: np.ndarray, law: Law) -> tuple[float, float]:
    """How well runs determine a law: (condition number of the Jacobian, largest |correlation| of two parameters)."""
    problem = _Problem(np.asarray(axes, float), np.asarray(loss, float))
    jacobian = problem.jacobian(problem.params(law))
    values = np.linalg.svd(jacobian, compute_uv=False)
    if values[-1] <= 1e-12 * values[0]:
        return float("inf"), 1.0
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    scale = np.sqrt(np.diag(covariance))
    apart = np.abs(covariance / np.outer(scale, scale)) - np.eye(len(scale))
    return float(values[0] / values[-1]), float(apart.max())
