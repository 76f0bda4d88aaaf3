"""From runs to laws with intervals, checked on held-out runs, and from laws to a larger budget. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from gr.errors import UserError
from gr.scaling.law import MOST, Law, fit_law

FEWEST_RUNS, FEWEST_BUDGETS = 6, 2  # five parameters
RUNS_FOR_INTERVALS, BUDGETS_FOR_INTERVALS, BUDGETS_FOR_LINE = 12, 3, 4
LEVEL = (2.5, 97.5)


def fit_runs(rows: list[dict[str, Any]], samples: int = 200) -> dict[str, Any]:
    """Fits L(N, D) and the compute line, and predicts what was held out.

    Args:
        rows: From ``table.read_runs``.
        samples: Bootstrap samples, by run; 0: none.

    Returns:
        Plain data: ``surface`` and ``line`` (laws, the line ``None`` below four budgets), ``bootstrap`` (laws),
        ``intervals`` (95 %, or ``None``), ``held_out`` (a row a run), ``flops_per_token`` (slope, intercept of
        log M on log N), ``n_range``, ``runs``, ``budgets``, ``notes``.

    Raises:
        UserError: Too few runs, sizes or budgets.
    """
    fitted = [row for row in rows if not row["holdout"]]
    budgets = sorted({row["budget"] for row in fitted})
    sizes = {row["n_encoder"] for row in fitted}
    if len(fitted) < FEWEST_RUNS:
        raise UserError(
            f"{len(fitted)} finished runs to fit; the law has five parameters and needs at least {FEWEST_RUNS}"
        )
    if len(budgets) < FEWEST_BUDGETS:
        raise UserError(f"all runs have the budget {budgets[0]:g}; a law needs at least {FEWEST_BUDGETS} budgets")
    if len(sizes) < 2:
        raise UserError(f"all runs have n_encoder {sizes.pop():g}; a law needs at least 2 sizes")
    axes = np.array([[row[name] for row in fitted] for name in ("n_encoder", "tokens")])
    loss = np.array([row["loss"] for row in fitted])
    surface = fit_law(axes, loss)
    notes, laws = [], []
    if len(fitted) < RUNS_FOR_INTERVALS or len(budgets) < BUDGETS_FOR_INTERVALS:
        notes.append(f"no intervals: they need {RUNS_FOR_INTERVALS} runs of {BUDGETS_FOR_INTERVALS} budgets")
    else:
        laws = _bootstrap(axes, loss, surface, samples)
    line = None
    if len(budgets) < BUDGETS_FOR_LINE:
        notes.append(f"no compute line: it needs {BUDGETS_FOR_LINE} fitted budgets, there are {len(budgets)}")
    else:
        best = [min(row["loss"] for row in fitted if row["budget"] == budget) for budget in budgets]
        line = fit_law(np.array([budgets]), np.array(best))
    bounds = _intervals(laws) or {"alpha": [surface.exponents[0]], "beta": [surface.exponents[1]]}
    for name in ("alpha", "beta"):
        if min(bounds[name]) < 1e-3 or max(bounds[name]) > 0.99 * MOST:
            notes.append(f"{name} reaches the end of its range (0 to {MOST:g}): these runs do not determine the law")
    slope, intercept = np.polyfit(np.log(axes[0]), np.log([row["model_flops"] / row["tokens"] for row in fitted]), 1)
    return {
        "objective": "sum of Huber(1e-3) of log-loss residuals; N = n_encoder, D = tokens read",
        "surface": asdict(surface),
        "line": None if line is None else asdict(line),
        "bootstrap": [asdict(law) for law in laws],
        "intervals": _intervals(laws),
        "held_out": [_held_out(row, surface, line, laws) for row in rows if row["holdout"]],
        "flops_per_token": [float(slope), float(intercept)],
        "n_range": [float(axes[0].min()), float(axes[0].max())],
        "runs": len(fitted),
        "budgets": budgets,
        "notes": notes,
    }


def _bootstrap(axes: np.ndarray, loss: np.ndarray, start: Law, samples: int) -> list[Law]:
    draw = np.random.default_rng(0)
    picks = (draw.integers(0, loss.size, loss.size) for _ in range(samples))
    return [fit_law(axes[:, pick], loss[pick], start) for pick in picks]


def _intervals(laws: list[Law]) -> dict[str, list[float]] | None:
    if not laws:
        return None
    every = {
        "E": [law.floor for law in laws],
        "alpha": [law.exponents[0] for law in laws],
        "beta": [law.exponents[1] for law in laws],
    }
    return {name: [float(x) for x in np.percentile(values, LEVEL)] for name, values in every.items()}


def _spread(laws: list[Law], n: float, d: float) -> list[float] | None:
    """95 % interval of the law's value, without the noise of one run."""
    return [float(x) for x in np.percentile([law(n, d) for law in laws], LEVEL)] if laws else None


def _held_out(row: dict[str, Any], surface: Law, line: Law | None, laws: list[Law]) -> dict[str, Any]:
    n, d = row["n_encoder"], row["tokens"]
    said = float(surface(n, d))
    found = {"run_id": row["run_id"], "budget": row["budget"], "n_encoder": n, "loss": row["loss"], "predicted": said}
    found |= {"interval": _spread(laws, n, d), "relative_error": said / row["loss"] - 1}
    return found | ({} if line is None else {"line": float(line(row["budget"]))})


def law_of(raw: dict[str, Any]) -> Law:
    """A law from plain data."""
    return Law(raw["floor"], tuple(raw["factors"]), tuple(raw["exponents"]), raw["objective"])


def predict(fitted: dict[str, Any], budget: float, sizes: list[tuple[float, float]] | None = None) -> dict[str, Any]:
    """The best size for a budget, and the loss to expect.

    Args:
        fitted: From ``fit_runs``.
        budget: Model FLOPs, above 0.
        sizes: (N, D) that can be run at that budget; ``None``: any N up to 1000 times the fitted ones, D from the
            fitted line of log FLOPs per token on log N.

    Returns:
        ``n_encoder``, ``tokens``, ``loss``, ``interval``, ``index`` (of the chosen size), ``at_end`` (it is the least
        or largest looked at), ``line`` (the compute line's loss, or ``None``).
    """
    surface, laws = law_of(fitted["surface"]), [law_of(raw) for raw in fitted["bootstrap"]]
    if sizes is None:
        low, high = fitted["n_range"]
        slope, intercept = fitted["flops_per_token"]
        grid = np.geomspace(low / 10, high * 1000, 4001)
        sizes = list(zip(grid, budget / np.exp(intercept) * grid**-slope, strict=True))
    n, d = np.array(sizes).T
    best = int(np.argmin(surface(n, d)))
    line = fitted["line"]
    return {
        "n_encoder": float(n[best]),
        "tokens": float(d[best]),
        "loss": float(surface(n[best], d[best])),
        "interval": _spread(laws, n[best], d[best]),
        "index": best,
        "at_end": n[best] in (n.min(), n.max()),
        "line": None if line is None else float(law_of(line)(budget)),
    }
