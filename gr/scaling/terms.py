"""Further terms of the surface L(N, D), each for a design that varies its axis.

``length`` and ``sparse`` add G x^-gamma: x is the mean number of keys that a token attends to, or the parameters of the
tables. ``repeats`` keeps the law and replaces D by what repeated tokens are worth (Muennighoff et al. 2023, arXiv
2305.16264, equation 5): with U unique tokens read e times, D' = U + U R (1 - exp(-(e - 1) / R)), so that a second pass
is worth almost a first one and no number of passes more than U (1 + R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from gr.errors import UserError
from gr.scaling.bootstrap import spread
from gr.scaling.law import Law, axes_of, conditioning, fit_law

FEWEST_RUNS = 12
FEWEST_VALUES = 3  # of the axis; two are met by any exponent
APART = 0.05  # values nearer than this, relative, are one
LEAST_WORTH, MOST_WORTH = 0.1, 1000.0  # of R
NEEDS = {"length": ("pairs",), "sparse": ("n_sparse",), "repeats": ("epochs",)}


def mean_attended(row: dict[str, Any]) -> float:
    """Keys that a token attends to, itself among them."""
    return row["pairs"] / row["tokens"]


def worth(tokens: np.ndarray, epochs: np.ndarray, r: float) -> np.ndarray:
    """(n,) D': unique tokens that would teach as much as ``tokens`` in ``epochs`` passes."""
    unique = tokens / np.maximum(epochs, 1.0)
    return np.where(epochs > 1, unique * (1 - r * np.expm1(-(epochs - 1) / r)), tokens)


def distinct(values: Sequence[float] | np.ndarray) -> int:
    """How many values there are that differ by more than ``APART``."""
    logs = np.sort(np.log(np.asarray(values, float)))
    return int(logs.size > 0) + int((np.diff(logs) > np.log1p(APART)).sum())


def fit_term(rows: Sequence[dict[str, Any]], term: str, samples: int = 200) -> dict[str, Any]:
    """Fits the surface with one further term.

    Args:
        rows: From ``table.read_runs``; runs that are held out are not looked at.
        term: length, sparse or repeats.
        samples: Bootstrap samples, by run; 0: none.

    Returns:
        ``law`` (of N, D and the term's axis; under ``repeats`` of N and D'), ``worth`` (R, or ``None``), ``plain`` (the
        objective that the surface alone reaches on the same runs), ``intervals`` (95 %, of ``gamma`` or ``R``; ``None``
        without a bootstrap), ``condition``, ``values`` (of the axis), ``runs``, ``notes``.

    Raises:
        UserError: A column is missing, or runs or values are too few to tell.
    """
    fitted = [_numbers(row, term) for row in rows if not row["holdout"]]
    _enough(fitted, term)
    axes, loss = axes_of(fitted), np.array([row["loss"] for row in fitted])
    plain, notes = fit_law(axes, loss), []
    if term == "repeats":
        epochs = np.array([row["epochs"] for row in fitted])
        r, law = _fit_worth(axes, epochs, loss, plain)
        full = np.array([axes[0], worth(axes[1], epochs, r)])
        name, values = "R", distinct(epochs[epochs > 1])
        if not 1.01 * LEAST_WORTH < r < 0.99 * MOST_WORTH:
            notes.append(
                f"R reaches the end of its range, {LEAST_WORTH:g} to {MOST_WORTH:g}: these runs do not tell it"
            )

        def again(pick: np.ndarray) -> tuple[float, Law]:
            return _fit_worth(axes[:, pick], epochs[pick], loss[pick], law, r)
    else:
        x = _axis(fitted, term)
        r, full = None, np.array([*axes, x])
        law = fit_law(full, loss)
        name, values = "gamma", distinct(x)

        def again(pick: np.ndarray) -> tuple[float, Law]:
            found = fit_law(full[:, pick], loss[pick], law)
            return found.exponents[2], found

    every = list(_resampled(again, loss.size, samples))
    condition, correlation = conditioning(full, loss, law)
    if not law.converged:
        raise UserError(
            f"the fit of term {term} did not converge: these runs do not determine it; add values of its axis"
        )
    if correlation > 0.99:
        notes.append(f"two parameters are correlated by {correlation:.4f}: their values mean little alone")
    if law.objective > 0.9 * plain.objective:
        notes.append(f"the term explains little: the objective falls from {plain.objective:.3g} to {law.objective:.3g}")
    return {"term": term, "law": asdict(law), "worth": r, "plain": plain.objective, "condition": condition,
            "intervals": {name: spread(every)} if every else None, "values": values, "runs": len(fitted),
            "notes": notes}  # fmt: skip


def _numbers(row: dict[str, Any], term: str) -> dict[str, Any]:
    found = dict(row)
    for name in NEEDS[term]:
        try:
            found[name] = float(row[name])
        except (KeyError, TypeError, ValueError):
            found[name] = float("nan")
        if not (np.isfinite(found[name]) and found[name] > 0):
            raise UserError(f"term {term} needs the column {name!r}, a number above 0 in every run; run "
                            f"{row['run_id']} has {row.get(name)!r}")  # fmt: skip
    return found


def _axis(rows: Sequence[dict[str, Any]], term: str) -> np.ndarray:
    """(n,) x of ``length`` or ``sparse``."""
    return np.array([mean_attended(row) if term == "length" else row["n_sparse"] for row in rows])


def _enough(rows: Sequence[dict[str, Any]], term: str) -> None:
    if len(rows) < FEWEST_RUNS:
        raise UserError(f"term {term} needs at least {FEWEST_RUNS} finished runs, and this table has {len(rows)}")
    if term == "repeats":
        again = [row for row in rows if row["epochs"] > 1]
        passes, unique = [row["epochs"] for row in again], [row["tokens"] / row["epochs"] for row in again]
        if distinct(passes) < FEWEST_VALUES or distinct(unique) < 2:
            raise UserError(
                f"term repeats needs runs of at least {FEWEST_VALUES} numbers of passes, above 1, over at least 2 "
                f"amounts of data, and this table has {distinct(passes)} over {distinct(unique)} (a design of kind "
                "data has them)"
            )
        return
    x = _axis(rows, term)
    if distinct(x) < FEWEST_VALUES:
        design = " (a design of kind length has them)" if term == "length" else ""
        raise UserError(
            f"term {term} needs at least {FEWEST_VALUES} values of its axis, and this table has {distinct(x)}{design}"
        )
    logs = np.log(np.array([np.full(len(x), np.e), *axes_of(rows), x]))
    rest = logs[3] - logs[:3].T @ np.linalg.lstsq(logs[:3].T, logs[3], rcond=None)[0]
    if np.abs(rest).max() < APART:
        raise UserError(f"term {term}'s axis follows from N and D in these runs: its share of the loss cannot be "
                        "told from theirs; vary it apart from them")  # fmt: skip


def _fit_worth(
    axes: np.ndarray, epochs: np.ndarray, loss: np.ndarray, start: Law, near: float | None = None
) -> tuple[float, Law]:
    """R (within a factor 10 of ``near``) and the law of least objective; for each R the start is refined."""

    def law(log_r: float) -> Law:
        return fit_law(np.array([axes[0], worth(axes[1], epochs, float(np.exp(log_r)))]), loss, start)

    grid = np.linspace(np.log(LEAST_WORTH), np.log(MOST_WORTH), 9)
    if near is None:
        best = int(np.argmin([law(x).objective for x in grid]))
        inside = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    else:
        inside = max(grid[0], np.log(near / 10)), min(grid[-1], np.log(near * 10))
    found = minimize_scalar(lambda x: law(x).objective, bounds=inside, method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x)), law(found.x)


def _resampled(fit: Callable[[np.ndarray], tuple[float, Law]], runs: int, samples: int) -> Iterator[float]:
    """The term's parameter of runs drawn with replacement, where the search ended by itself."""
    draw = np.random.default_rng(0)
    for _ in range(samples):
        value, law = fit(draw.integers(0, runs, runs))
        if law.converged:
            yield value


def describe_term(found: dict[str, Any]) -> str:
    """In words."""
    law, bounds = found["law"], found["intervals"] or {}
    name = "R" if found["term"] == "repeats" else "gamma"
    value = found["worth"] if name == "R" else law["exponents"][2]
    wide = f" [{bounds[name][0]:.3g}, {bounds[name][1]:.3g}]" if bounds else ""
    return (
        f"term {found['term']}: {name} {value:.4g}{wide}  E {law['floor']:.4f}  alpha {law['exponents'][0]:.4f}  "
        f"beta {law['exponents'][1]:.4f}  objective {law['objective']:.4g}, without it {found['plain']:.4g}"
    )
