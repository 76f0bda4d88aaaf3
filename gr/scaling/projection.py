"""The same law by variable projection: given the exponents, E and the A_k are a linear problem with signs.

Only the exponents are searched, which is far better conditioned than all parameters at once; the second opinion beside
``law.fit_law``. The objective differs: squares of relative residuals, or their Huber weights by reweighting.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import minimize, nnls

from gr.scaling.law import DELTA, MOST, Law

GRID = np.geomspace(0.05, 2.0, 16)
ROUNDS = 8  # of reweighting; the weights no longer change after four or five


def project_law(axes: np.ndarray, loss: np.ndarray, huber: bool = False) -> Law:
    """The law of least sum of squared relative residuals.

    Args:
        axes: (k, n) positive.
        loss: (n,) positive.
        huber: Whether squares are reweighted to Huber terms of ``law.DELTA``.

    Returns:
        The law; its ``objective`` is the (weighted) half sum of squares.
    """
    logs, loss = np.log(np.asarray(axes, float)), np.asarray(loss, float)
    mean = logs.mean(axis=1, keepdims=True)
    logs = logs - mean

    def linear(exponents: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
        columns = np.concatenate([np.ones((1, loss.size)), np.exp(-exponents[:, None] * logs)]).T / loss[:, None]
        columns *= weight[:, None]
        norm = np.linalg.norm(columns, axis=0)
        found, rest = nnls(columns / norm, weight)
        return found / norm, float(rest)

    def search(weight: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        def rest(x: np.ndarray) -> float:
            inside = np.clip(x, np.log(1e-3), np.log(MOST))
            return linear(np.exp(inside), weight)[1] + float(np.abs(x - inside).sum())

        starts = [np.array(x) for x in itertools.product(np.log(GRID), repeat=len(logs))] if start is None else [start]
        best = sorted(starts, key=rest)[:3]
        options = {"xatol": 1e-8, "fatol": 1e-14, "maxiter": 2000}
        found = [minimize(rest, x, method="Nelder-Mead", options=options) for x in best]
        return np.clip(min(found, key=lambda x: x.fun).x, np.log(1e-3), np.log(MOST))

    weight = np.ones_like(loss)
    logged = search(weight, None)
    for _ in range(ROUNDS if huber else 0):
        factors, _ = linear(np.exp(logged), weight)
        said = factors[0] + factors[1:] @ np.exp(-np.exp(logged)[:, None] * logs)
        weight = np.sqrt(np.minimum(1.0, DELTA / np.maximum(np.abs(said / loss - 1), 1e-30)))
        logged = search(weight, logged)
    exponents = np.exp(logged)
    factors, rest = linear(exponents, weight)
    scaled = factors[1:] * np.exp(exponents * mean[:, 0])
    return Law(float(factors[0]), tuple(map(float, scaled)), tuple(map(float, exponents)), rest**2 / 2)
