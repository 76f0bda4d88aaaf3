"""From runs to laws with intervals, checked on held-out runs, and from laws to a larger budget. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gr.errors import UserError
from gr.scaling.bootstrap import bootstrap, run_interval, seed_noise, spread
from gr.scaling.frontier import Price, best_size
from gr.scaling.isoflop import FEWEST_SIZES, envelope, optimum_exponents, parabolas
from gr.scaling.law import MOST, Law, axes_of, conditioning, fit_law, law_of
from gr.scaling.projection import project_law
from gr.scaling.quality import fit_quality, foretell
from gr.scaling.table import METRICS

FEWEST_RUNS, FEWEST_BUDGETS = 6, 2  # five parameters
RUNS_FOR_INTERVALS, BUDGETS_FOR_INTERVALS, BUDGETS_FOR_LINE = 12, 3, 4
CORRELATED = 0.99
OBJECTIVE = "sum of Huber(1e-3) of log-loss residuals; N = n_encoder, D = tokens read"


def fit_runs(rows: list[dict[str, Any]], samples: int = 200) -> dict[str, Any]:
    """Fits L(N, D), the compute line and the metrics, and predicts what was held out.

    Args:
        rows: From ``table.read_runs``.
        samples: Bootstrap samples; 0: none.

    Returns:
        Plain data. ``surface`` and ``line`` (laws, the line ``None`` below four budgets), ``projected`` (the same
        surface by variable projection: least squares and Huber), ``parabolas`` and ``optimum`` (exponents of N* and
        D*), ``envelope`` (run ids), ``bootstrap`` and ``seed_bootstrap`` (laws), ``intervals`` (95 %, or ``None``),
        ``noise`` (seed, scatter about the law, drift), ``step_ahead`` (a row a budget that was foretold from smaller
        ones), ``held_out`` (a row a run), ``quality`` (a form a metric), ``price``, ``n_range``, ``residuals``,
        ``condition``, ``correlation``, ``runs``, ``budgets``, ``notes``.

    Raises:
        UserError: Too few runs, sizes or budgets.
    """
    fitted = [row for row in rows if not row["holdout"]]
    surface = surface_of(fitted)
    budgets = sorted({row["budget"] for row in fitted})
    axes, loss = axes_of(fitted), np.array([row["loss"] for row in fitted])
    notes: list[str] = []
    if not surface.converged:
        notes.append("the fit did not converge: these runs do not determine the law; add sizes or budgets")
    laws, by_seed = _bootstraps(fitted, budgets, surface, samples, notes)
    front = envelope(fitted)
    line = None
    best = _best(fitted, budgets, front)
    if len(best) < BUDGETS_FOR_LINE:
        notes.append(f"no compute line: it needs {BUDGETS_FOR_LINE} fitted budgets, there are {len(best)}")
    else:
        line = fit_law(np.array([list(best)]), np.array(list(best.values())))
    lengths = {row["max_events"] for row in fitted if row.get("max_events")}
    if len(lengths) > 1:
        notes.append(f"runs read {len(lengths)} lengths of history, which L(N, D) leaves out; --term length fits them")
    if len({row["train_users"] for row in fitted if row.get("train_users")}) > 1:
        notes.append("runs repeat different amounts of data, which L(N, D) leaves out; --term repeats fits them")
    found = parabolas(fitted)
    if all(row["sizes"] < FEWEST_SIZES for row in found):
        notes.append(f"no parabolas: no budget has {FEWEST_SIZES} sizes")
    else:
        notes += [f"budget {row['budget']:g} has no parabola: {row['why']}" for row in found if row["why"]]
    residuals = np.log(loss) - np.log(surface(*axes))
    steps = _step_ahead(fitted, budgets)
    seed = seed_noise(fitted)
    noise = {
        "seed": None if seed is None else seed[0],
        "seed_freedom": 0 if seed is None else seed[1],
        "scatter": float(np.sqrt((residuals**2).sum() / max(1, len(fitted) - 5))),
        "drift": abs(float(np.log1p(steps[-1]["relative_error"]))) if steps else 0.0,
    }
    condition, correlation = conditioning(axes, loss, surface)
    _warn(surface, laws, correlation, notes)
    quality = {
        name: form for name in fitted[0] if name.startswith(METRICS) and (form := fit_quality(fitted, name)) is not None
    }
    price = Price.of(fitted)
    result: dict[str, Any] = {
        "objective": OBJECTIVE,
        "surface": asdict(surface),
        "line": None if line is None else asdict(line),
        "projected": {name: asdict(project_law(axes, loss, name == "huber")) for name in ("squares", "huber")},
        "parabolas": found,
        "optimum": optimum_exponents(found),
        "envelope": [row["run_id"] for row in front],
        "bootstrap": [asdict(law) for law in laws],
        "seed_bootstrap": [asdict(law) for law in by_seed],
        "intervals": _intervals(laws),
        "seed_intervals": _intervals(by_seed),
        "noise": noise,
        "step_ahead": steps,
        "quality": quality,
        "price": list(price.parts),
        "n_range": [float(axes[0].min()), float(axes[0].max())],
        "residuals": {row["run_id"]: float(x) for row, x in zip(fitted, residuals, strict=True)},
        "condition": condition,
        "correlation": correlation,
        "runs": len(fitted),
        "budgets": budgets,
        "notes": notes,
    }
    result["held_out"] = [_held_out(row, result, laws) for row in rows if row["holdout"]]
    return result


def surface_of(rows: Sequence[dict[str, Any]]) -> Law:
    """L(N, D) of the runs that are not held out, without anything around it: in a second.

    Raises:
        UserError: Too few runs, sizes or budgets.
    """
    fitted = [row for row in rows if not row["holdout"]]
    _check_enough(fitted)
    return fit_law(axes_of(fitted), np.array([row["loss"] for row in fitted]))


def _best(
    fitted: Sequence[dict[str, Any]], budgets: Sequence[float], front: Sequence[dict[str, Any]]
) -> dict[float, float]:
    """Budget -> least loss; where few budgets have two sizes (a grid), of the runs on the envelope alone."""
    sizes = [len({row["n_encoder"] for row in fitted if row["budget"] == budget}) for budget in budgets]
    if 2 * sum(count > 1 for count in sizes) < len(budgets):
        return {row["budget"]: row["loss"] for row in front}
    return {budget: min(row["loss"] for row in fitted if row["budget"] == budget) for budget in budgets}


def _check_enough(fitted: Sequence[dict[str, Any]]) -> None:
    budgets = sorted({row["budget"] for row in fitted})
    sizes = {row["n_encoder"] for row in fitted}
    if len(fitted) < FEWEST_RUNS:
        raise UserError(
            f"the law has five parameters and needs at least {FEWEST_RUNS} finished runs, "
            f"and this table has {len(fitted)}"
        )
    if len(budgets) < FEWEST_BUDGETS:
        raise UserError(f"all runs have the budget {budgets[0]:g}; a law needs at least {FEWEST_BUDGETS} budgets")
    if len(sizes) < 2:
        raise UserError(f"all runs have n_encoder {sizes.pop():g}; a law needs at least 2 sizes")


def _bootstraps(
    fitted: list[dict[str, Any]], budgets: list[float], surface: Law, samples: int, notes: list[str]
) -> tuple[list[Law], list[Law]]:
    if len(fitted) < RUNS_FOR_INTERVALS or len(budgets) < BUDGETS_FOR_INTERVALS:
        notes.append(f"no intervals: they need {RUNS_FOR_INTERVALS} runs of {BUDGETS_FOR_INTERVALS} budgets")
        return [], []
    every = list(bootstrap(fitted, surface, samples))
    laws = [law for law in every if law.converged]
    if len(laws) < len(every):
        notes.append(f"{len(every) - len(laws)} of {len(every)} bootstrap fits did not converge and are left out")
    if seed_noise(fitted) is None:
        notes.append("no seed interval: no cell has two seeds")
        return laws, []
    return laws, [law for law in bootstrap(fitted, surface, samples, "seed") if law.converged]


def _step_ahead(fitted: list[dict[str, Any]], budgets: list[float]) -> list[dict[str, Any]]:
    """What the law of all smaller budgets said of each budget's best run."""
    found = []
    for budget in budgets:
        before = [row for row in fitted if row["budget"] < budget]
        if len(before) < FEWEST_RUNS or len({row["budget"] for row in before}) < FEWEST_BUDGETS:
            continue
        law = fit_law(axes_of(before), np.array([row["loss"] for row in before]))
        last = min((row for row in fitted if row["budget"] == budget), key=lambda row: row["loss"])
        said = float(law(last["n_encoder"], last["tokens"]))
        found.append({"budget": budget, "run_id": last["run_id"], "loss": last["loss"], "predicted": said,
                      "relative_error": said / last["loss"] - 1})  # fmt: skip
    return found


def _warn(surface: Law, laws: list[Law], correlation: float, notes: list[str]) -> None:
    bounds = _intervals(laws) or {"alpha": [surface.exponents[0]], "beta": [surface.exponents[1]]}
    for name in ("alpha", "beta"):
        if min(bounds[name]) < 1e-3 or max(bounds[name]) > 0.99 * MOST:
            notes.append(f"{name} reaches the end of its range (0 to {MOST:g}): these runs do not determine the law")
    if correlation > CORRELATED:
        notes.append(f"two parameters of the law are correlated by {correlation:.4f}: their values mean little alone")


def _intervals(laws: list[Law]) -> dict[str, list[float]] | None:
    """Of the parameters, and of a = beta / (alpha + beta): with FLOPs of 6 N D, N* grows as C^a."""
    if not laws:
        return None
    alpha, beta = np.array([law.exponents for law in laws]).T
    every = {"E": [law.floor for law in laws], "alpha": alpha, "beta": beta}
    total = alpha + beta
    if total.min() > 0:
        every["a"] = beta / total
    return {name: spread(values) for name, values in every.items()}


def _held_out(row: dict[str, Any], fitted: dict[str, Any], laws: list[Law]) -> dict[str, Any]:
    n, d = row["n_encoder"], row["tokens"]
    loss = float(law_of(fitted["surface"])(n, d))
    found = {"run_id": row["run_id"], "budget": row["budget"], "n_encoder": n, "loss": row["loss"], "predicted": loss}
    found |= {"interval": _law_interval(laws, n, d), "run_interval": _run_interval(fitted, laws, n, d)}
    found["relative_error"] = loss / row["loss"] - 1
    found["quality"] = {
        name: {"seen": row[name], **said, "error": said["predicted"] - row[name]}
        for name, said in told(fitted, row["budget"], n, d).items()
        if name in row
    }
    line = fitted["line"]
    return found | ({} if line is None else {"line": float(law_of(line)(row["budget"]))})


def _law_interval(laws: Sequence[Law], n: float, d: float) -> list[float] | None:
    """95 % interval of the law's value, without the noise of one run."""
    return spread([float(law(n, d)) for law in laws]) if laws else None


def _run_interval(fitted: dict[str, Any], laws: Sequence[Law], n: float, d: float) -> list[float] | None:
    noise = fitted["noise"]
    return run_interval(laws, n, d, max(noise["scatter"], noise["seed"] or 0.0), noise["drift"])


def told(fitted: dict[str, Any], budget: float, n: float, d: float) -> dict[str, Any]:
    """Each metric's ``predicted``, ``interval`` and ``form``."""
    return {name: foretell(raw, budget, n, d) for name, raw in fitted["quality"].items()}


def any_sizes(fitted: dict[str, Any]) -> np.ndarray:
    """N from a tenth of the least fitted one to a thousand times the largest."""
    low, high = fitted["n_range"]
    return np.geomspace(low / 10, high * 1000, 4001)


def predict(fitted: dict[str, Any], budget: float, sizes: list[tuple[float, float]] | None = None) -> dict[str, Any]:
    """The best size for a budget, and the loss and metrics to expect.

    Args:
        fitted: From ``fit_runs``.
        budget: Model FLOPs, above 0.
        sizes: (N, D) that can be run at that budget; ``None``: any N up to 1000 times the fitted ones, D from the
            fitted price of a token.

    Returns:
        ``n_encoder``, ``tokens``, ``loss``, ``interval`` (of the law), ``run_interval`` (of a run), ``index`` (of the
        chosen size), ``at_end`` (it is the least or largest looked at), ``line`` (the compute line's loss, or
        ``None``), ``quality`` (a metric's ``predicted``, ``interval`` and ``form``).
    """
    surface, laws = law_of(fitted["surface"]), [law_of(raw) for raw in fitted["bootstrap"]]
    if sizes is None:
        grid = any_sizes(fitted)
        n, d, _ = best_size(surface, Price(fitted["price"]), budget, grid)
        index, ends = int(np.argmin(np.abs(grid - n))), (grid[0], grid[-1])
    else:
        every_n, every_d = np.array(sizes).T
        index = int(np.argmin(surface(every_n, every_d)))
        n, d, ends = float(every_n[index]), float(every_d[index]), (every_n.min(), every_n.max())
    line = fitted["line"]
    return {
        "n_encoder": n,
        "tokens": d,
        "loss": float(surface(n, d)),
        "interval": _law_interval(laws, n, d),
        "run_interval": _run_interval(fitted, laws, n, d),
        "index": index,
        "at_end": n in ends,
        "line": None if line is None else float(law_of(line)(budget)),
        "quality": told(fitted, budget, n, d),
    }
