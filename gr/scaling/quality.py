"""HR, NDCG and the like against compute: three forms, of which the one that foretells the largest budget best is taken.

A metric is fitted by itself, not through the loss. ``line``: q0 + q1 log10 C, as HSTU's figures are read (arXiv
2402.17152); ``saturating``: Qmax - k C^-gamma; ``surface``: Qmax - A N^-alpha - B D^-beta. The last two are
``law.fit_law`` of 1 - Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr.scaling.law import Law, axes_of, fit_law

Rows = Sequence[dict[str, Any]]
FEWEST_BUDGETS = 3  # one to try the forms on, and two for a line


@dataclass(frozen=True)
class Quality:
    """A fitted form of a metric.

    Attributes:
        form: line, saturating or surface.
        line: (q0, q1), or ``None``.
        law: Of 1 - Q, or ``None``.
    """

    form: str
    line: tuple[float, float] | None = None
    law: Law | None = None

    def __call__(self, flops: float, n: float, tokens: float) -> float:
        """The metric of a run at its budget's best size (``surface``: of any run)."""
        if self.line is not None:
            return float(self.line[0] + self.line[1] * np.log10(flops))
        assert self.law is not None, "a quality is a line or a law"
        return float(1.0 - (self.law(flops) if self.form == "saturating" else self.law(n, tokens)))


def best_of_budgets(rows: Rows, metric: str) -> list[dict[str, Any]]:
    """The best run of every budget, by the metric's mean over the seeds of a size."""
    found = []
    for budget in sorted({row["budget"] for row in rows}):
        sizes: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if row["budget"] == budget:
                sizes.setdefault(row["n_encoder"], []).append(row)
        mean = {n: float(np.mean([row[metric] for row in mine])) for n, mine in sizes.items()}
        best = max(mean, key=lambda n: mean[n])
        found.append({**sizes[best][0], metric: mean[best]})
    return found


def _line(rows: Rows, metric: str) -> Quality:
    best = best_of_budgets(rows, metric)
    slope, start = np.polyfit(np.log10([row["budget"] for row in best]), [row[metric] for row in best], 1)
    return Quality("line", line=(float(start), float(slope)))


def _saturating(rows: Rows, metric: str) -> Quality:
    best = best_of_budgets(rows, metric)
    axes = np.array([[row["budget"] for row in best]])
    return Quality("saturating", law=fit_law(axes, 1.0 - np.array([row[metric] for row in best])))


def _surface(rows: Rows, metric: str) -> Quality:
    return Quality("surface", law=fit_law(axes_of(rows), 1.0 - np.array([row[metric] for row in rows])))


FORMS: dict[str, Callable[[Rows, str], Quality]] = {"line": _line, "saturating": _saturating, "surface": _surface}


def fit_quality(rows: Rows, metric: str) -> tuple[Quality, dict[str, float]] | None:
    """The form that foretells the largest budget from the others, fitted to all.

    Args:
        rows: Runs to fit.
        metric: A column in (0, 1).

    Returns:
        The form, and each form's mean absolute error on the largest budget's best run; ``None`` if there are too few
        budgets or a run lacks the metric.
    """
    budgets = sorted({row["budget"] for row in rows})
    if len(budgets) < FEWEST_BUDGETS or not all(0 <= row.get(metric, -1.0) < 1 for row in rows):
        return None
    before = [row for row in rows if row["budget"] < budgets[-1]]
    last = best_of_budgets([row for row in rows if row["budget"] == budgets[-1]], metric)[0]
    at = (last["budget"], last["n_encoder"], last["tokens"])
    able = {name: form for name, form in FORMS.items() if len(budgets) > FEWEST_BUDGETS or name != "saturating"}
    errors = {name: abs(form(before, metric)(*at) - last[metric]) for name, form in able.items()}
    best = min(errors, key=lambda name: errors[name])
    return FORMS[best](rows, metric), errors
