"""Two older ways to a law, for comparison: the envelope of finished runs, and a parabola in log N a budget.

Hoffmann et al. 2022 (arXiv 2203.15556), approaches 1 and 2. The parabola is biased where the grid of sizes is wide or
off the optimum and the exponents differ (``tests/scaling/test_scaling_methods.py`` shows it): never trust it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST_SIZES = 3  # of a parabola; five tell whether it is one


def parabolas(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per budget the parabola of loss over log N.

    Returns:
        A row a budget: ``budget``, ``sizes`` (how many), ``coefficients`` (of (log N)^2, log N, 1), ``n_best``,
        ``tokens_best``, ``loss_best``, and ``why`` the minimum does not count, or ``None``.
    """
    found = []
    for budget in sorted({row["budget"] for row in rows}):
        mine = [row for row in rows if row["budget"] == budget]
        logs = np.log([row["n_encoder"] for row in mine])
        sizes = len(set(logs.tolist()))
        row: dict[str, Any] = {"budget": budget, "sizes": sizes}
        if sizes < FEWEST_SIZES:
            found.append(row | {"why": f"{sizes} sizes, fewer than {FEWEST_SIZES}"})
            continue
        square, slope, start = np.polyfit(logs, [row["loss"] for row in mine], 2)
        row["coefficients"] = [float(square), float(slope), float(start)]
        best = -slope / 2 / square
        if square <= 0 or not logs.min() < best < logs.max():
            found.append(row | {"why": "no minimum among its sizes"})
            continue
        log_tokens = np.polyfit(logs, np.log([row["tokens"] for row in mine]), 1)
        found.append(row | {
            "n_best": float(np.exp(best)),
            "tokens_best": float(np.exp(np.polyval(log_tokens, best))),
            "loss_best": float(np.polyval((square, slope, start), best)),
            "why": None,
        })  # fmt: skip
    return found


def optimum_exponents(found: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """``n`` and ``tokens``: exponents of C in N*(C) and D*(C); ``None`` with fewer than two minima."""
    good = [row for row in found if row["why"] is None]
    if len(good) < 2:
        return None
    budgets = np.log([row["budget"] for row in good])
    names = {"n": "n_best", "tokens": "tokens_best"}
    return {name: float(np.polyfit(budgets, np.log([row[key] for row in good]), 1)[0]) for name, key in names.items()}


def envelope(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finished runs that no run of as few FLOPs matches, by FLOPs. Curves of unfinished schedules are not looked at."""
    best, front = np.inf, []
    for row in sorted(rows, key=lambda row: (row["model_flops"], row["loss"])):
        if row["loss"] < best:
            best = row["loss"]
            front.append(row)
    return front
