"""HR, NDCG and the like: four forms, and which of them foretells a run.

``surface``: Qmax - A N^-alpha - B D^-beta, which is ``law.fit_law`` of 1 - Q. ``through``: in two steps, the logit of Q
is a parabola in the loss over the three largest budgets, and the loss, of all budgets, follows its own law. (Over more
the logit may bend both ways, as on the planted world of benchmarks/results/scaling_planted_2.md, which a parabola does
not.) Both say a value for any run and are what a run is foretold by. Two more are of the best run of each budget, to be
read beside others' figures: ``line``: q0 + q1 log10 C, as HSTU's are drawn (arXiv 2402.17152), and ``saturating``:
Qmax - k C^-gamma. A line cannot saturate; on the study of benchmarks/results/scaling_planted.md it was .010 to .049 off
ten times ahead where ``surface`` was at most .008.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import expit, logit

from gr.scaling.law import Law, axes_of, fit_law, law_of

Rows = Sequence[dict[str, Any]]
FEWEST_BUDGETS = 3  # two for a law, one to try the forms on
PARABOLA = 3  # budgets, the largest, that the logit's parabola is fitted to
FORETELLS = ("surface", "through")
FREE = {"surface": 5, "through": 3, "line": 2, "saturating": 3}  # parameters (of ``through``: without the loss's)


@dataclass(frozen=True)
class Quality:
    """A fitted form of a metric.

    Attributes:
        form: surface, through, line or saturating.
        line: (q0, q1), or ``None``.
        law: Of 1 - Q; ``through``: of the loss; or ``None``.
        curve: Coefficients of the parabola, the highest first, or ``None``.
    """

    form: str
    line: tuple[float, float] | None = None
    law: Law | None = None
    curve: tuple[float, float, float] | None = None

    def __call__(self, flops: float, n: float, tokens: float) -> float:
        """The metric of a run; ``line`` and ``saturating``: of the best at its budget."""
        if self.line is not None:
            return float(self.line[0] + self.line[1] * np.log10(flops))
        assert self.law is not None, "a quality is a line or a law"
        if self.curve is not None:
            return float(expit(np.polyval(self.curve, self.law(n, tokens))))
        return float(1.0 - (self.law(flops) if self.form == "saturating" else self.law(n, tokens)))


def quality_of(raw: dict[str, Any]) -> Quality:
    """A form from plain data."""
    line, law, curve = raw["line"], raw["law"], raw["curve"]
    return Quality(raw["form"], None if line is None else tuple(line), None if law is None else law_of(law),
                   None if curve is None else tuple(curve))  # fmt: skip


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


@lru_cache(maxsize=8)
def _loss_law(runs: tuple[tuple[float, float, float], ...]) -> Law:
    """Of (N, D, loss); the same for every metric of a table."""
    n, tokens, loss = np.array(runs).T
    return fit_law(np.array([n, tokens]), loss)


def _recent(rows: Rows) -> Rows:
    """Runs of the largest budgets."""
    budgets = sorted({row["budget"] for row in rows})[-PARABOLA:]
    return [row for row in rows if row["budget"] in budgets]


def _through(rows: Rows, metric: str) -> Quality:
    law = _loss_law(tuple((row["n_encoder"], row["tokens"], row["loss"]) for row in rows))
    rows = _recent(rows)
    inside = np.clip([row[metric] for row in rows], 1e-6, 1 - 1e-6)
    curve = np.polyfit([row["loss"] for row in rows], logit(inside), 2)
    return Quality("through", law=law, curve=(float(curve[0]), float(curve[1]), float(curve[2])))


FORMS: dict[str, Callable[[Rows, str], Quality]] = {
    "surface": _surface,
    "through": _through,
    "line": _line,
    "saturating": _saturating,
}


SPEAKS_OF: dict[str, Callable[[Rows, str], Rows]] = {
    "surface": lambda rows, metric: rows,
    "through": lambda rows, metric: _recent(rows),
    "line": best_of_budgets,
    "saturating": best_of_budgets,
}
"""The runs that a form's scatter is taken over."""


def _misses(form: Quality, rows: Rows, metric: str) -> np.ndarray:
    """Said minus seen."""
    seen = SPEAKS_OF[form.form](rows, metric)
    return np.array([form(row["budget"], row["n_encoder"], row["tokens"]) - row[metric] for row in seen])


def fit_quality(rows: Rows, metric: str) -> dict[str, Any] | None:
    """Every form fitted to all budgets (the parabola of ``through`` to the largest), and the one of FORETELLS that told
    the largest budget best from the others.

    Args:
        rows: Runs to fit.
        metric: A column in (0, 1).

    Returns:
        Plain data: ``form`` (the chosen), ``forms`` (each one's parameters, ``saturating`` from four budgets on),
        ``errors`` (root mean square of each form's errors on the largest budget, foretold from the smaller ones),
        ``scatter`` (each one's standard deviation about its own fit); ``None`` if there are too few budgets or a run
        lacks the metric.
    """
    budgets = sorted({row["budget"] for row in rows})
    if len(budgets) < FEWEST_BUDGETS or not all(0 <= row.get(metric, -1.0) < 1 for row in rows):
        return None
    before = [row for row in rows if row["budget"] < budgets[-1]]
    last = [row for row in rows if row["budget"] == budgets[-1]]
    able = {name: form for name, form in FORMS.items() if len(budgets) > FEWEST_BUDGETS or name != "saturating"}
    forms = {name: form(rows, metric) for name, form in able.items()}
    errors, scatter = {}, {}
    for name, form in able.items():
        errors[name] = float(np.sqrt(np.square(_misses(form(before, metric), last, metric)).mean()))
        rest = _misses(forms[name], rows, metric)
        scatter[name] = float(np.sqrt(np.square(rest).sum() / max(1, len(rest) - FREE[name])))
    return {
        "form": min(FORETELLS, key=lambda name: errors[name]),
        "forms": {name: asdict(form) for name, form in forms.items()},
        "errors": errors,
        "scatter": scatter,
    }


def foretell(fitted: dict[str, Any], flops: float, n: float, tokens: float) -> dict[str, Any]:
    """A metric of a further run.

    Args:
        fitted: From ``fit_quality``.
        flops, n, tokens: Of the run.

    Returns:
        ``form``, ``predicted`` and ``interval`` (95 %): of the scatter of runs, of the form's error one budget ahead,
        and of what the two forms that foretell disagree by.
    """
    every = {name: quality_of(raw)(flops, n, tokens) for name, raw in fitted["forms"].items() if name in FORETELLS}
    name = fitted["form"]
    apart = (max(every.values()) - min(every.values())) / 2
    wide = 1.96 * float(np.sqrt(fitted["scatter"][name] ** 2 + fitted["errors"][name] ** 2 + apart**2))
    return {"form": name, "predicted": every[name], "interval": [every[name] - wide, every[name] + wide]}
