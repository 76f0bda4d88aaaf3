"""``gr-scaling selftest``: the whole way on a tiny study, and a law that is known. A good minute of one idle core."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gr.scaling.design import load_study
from gr.scaling.driver import run_plan
from gr.scaling.fit import fit_runs
from gr.scaling.law import Law, fit_law
from gr.scaling.plan import make_plan
from gr.scaling.report import write_report
from gr.scaling.store import all_runs
from gr.scaling.table import collect, read_runs

MOST_OFF = 0.03  # of a held-out loss
PLANTED = Law(1.8, (480.0, 2100.0), (0.34, 0.28), 0.0)


@contextlib.contextmanager
def _folder(out: str | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def recovered() -> float:
    """Largest error of an exponent when a law without noise is fitted."""
    budget = np.repeat(np.logspace(17, 19, 5), 7)
    n = np.sqrt(budget / 120) * np.tile(np.geomspace(0.25, 4, 7), 5)
    axes = np.array([n, budget / 6 / n])
    return float(np.abs(np.subtract(fit_law(axes, PLANTED(*axes)).exponents, PLANTED.exponents)).max())


def checks(folder: Path) -> Iterator[tuple[str, bool]]:
    """Each statement about the harness, and whether it holds here."""
    off = recovered()
    yield f"a known law is found again: exponents off by {off:.1e}, at most 1e-3", off < 1e-3
    places = ["--out", str(folder), "--cache", str(folder / "cache")]
    study, path = load_study("configs/scaling/selftest.yaml", places)
    plan = make_plan(study, path)
    off = max(abs(spec.cost / spec.budget - 1) for spec in plan.specs)
    yield (
        f"{len(plan.specs)} runs are planned within {100 * off:.2f} % of their budgets, at most "
        f"{100 * study.limits.flop_tolerance:g} %",
        off <= study.limits.flop_tolerance,
    )
    outcome = run_plan(study, plan.specs, say=lambda line: print(f"  {line}", flush=True))
    yield f"{len(outcome.ran) + outcome.already} of them are done", not outcome.failed and not outcome.stopped
    results = [(run.spec(), run.result()) for run in all_runs(study.folder)]
    same = all(result and result["measured"]["model_flops"] == spec.cost for spec, result in results)
    yield "every run has spent exactly what was planned", same
    table, _ = collect(study.folder)
    rows, _ = read_runs(table)
    budgets = sorted({row["budget"] for row in rows})
    best = [min(row["loss"] for row in rows if row["budget"] == budget) for budget in budgets]
    told = ", ".join(f"{loss:.3f}" for loss in best)
    yield f"the best loss falls with every budget: {told}", all(np.diff(best) < 0)
    yield (
        "no loss lies below the least that the world allows",
        all(row["loss"] > float(row["loss_floor"]) for row in rows),
    )
    held = fit_runs(rows, samples=0)["held_out"]
    worst = max(abs(row["relative_error"]) for row in held)
    yield (
        f"{len(held)} held-out losses are foretold within {100 * worst:.2f} %, at most {100 * MOST_OFF:g} %",
        (worst < MOST_OFF),
    )
    paths = write_report(table, study.folder, samples=0)
    yield f"{paths[0].name} and {len(paths) - 2} figures are drawn", all(path.stat().st_size > 1000 for path in paths)


def selftest(out: str | None = None) -> int:
    """Prints every check; exit status 1 if one fails."""
    failed = 0
    with _folder(out) as folder:
        for said, holds in checks(folder):
            print(f"{'ok' if holds else 'FAILED':<6} {said}", flush=True)
            failed += not holds
    return int(failed > 0)
