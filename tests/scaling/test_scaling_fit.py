"""Planted laws are found again to the errors measured when the method was specified, and tables that cannot be fitted
are refused in one sentence."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from gr.scaling.cli import main
from gr.scaling.fit import fit_runs, predict
from gr.scaling.law import Law, _Problem, fit_law, law_of
from gr.scaling.table import read_runs

TRUE = Law(1.8, (480.0, 2100.0), (0.34, 0.28), 0.0)


def surface(budgets: int, sizes: int, low: float = 17, high: float = 19, noise: float = 0.0, seed: int = 0):
    """Runs around the optimum of each budget, C = 6 N D; (budget, N, D, loss)."""
    budget = np.repeat(np.logspace(low, high, budgets), sizes)
    centre = np.sqrt(budget / 6 / 20)
    n = centre * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    d = budget / 6 / n
    return budget, n, d, TRUE(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(n.size))


def table(runs) -> list[dict]:
    names = ("run_id", "budget", "n_encoder", "tokens", "model_flops", "loss", "holdout")
    return [dict(zip(names, (f"r{i}", c, n, d, c, x, False), strict=True))
            for i, (c, n, d, x) in enumerate(zip(*runs, strict=True))]  # fmt: skip


def write(path, rows, **more) -> str:
    rows = [{**row, **more} for row in rows]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_the_jacobian_is_the_derivative_of_the_residuals() -> None:
    _, n, d, loss = surface(3, 3)
    problem, params = _Problem(np.array([n, d]), loss), np.array([-0.5, -0.2, 0.3, 0.4, 0.3])
    for i, row in enumerate(problem.jacobian(params)):
        numeric = approx_fprime(params, lambda x, i=i: problem.residuals(x)[i], 1e-7)
        assert np.abs(row - numeric).max() < 1e-5


def test_there_are_4500_starts() -> None:
    _, n, d, loss = surface(3, 3)
    assert _Problem(np.array([n, d]), loss).starts().shape == (4500, 5)


def test_a_law_without_noise_is_found_exactly() -> None:
    _, n, d, loss = surface(5, 9)
    law = fit_law(np.array([n, d]), loss)
    assert np.abs(np.subtract(law.exponents, TRUE.exponents)).max() < 1e-3
    assert abs(law.floor - TRUE.floor) < 1e-3


def test_a_law_with_noise_of_a_thousandth_is_found_to_five() -> None:
    _, n, d, loss = surface(5, 9, noise=1e-3)
    law = fit_law(np.array([n, d]), loss)
    assert np.abs(np.subtract(law.exponents, TRUE.exponents)).max() < 0.005


def test_a_hundred_times_the_compute_is_predicted() -> None:
    runs = surface(5, 7, noise=1e-3)
    fitted = fit_runs(table(runs), samples=40)
    found = predict(fitted, 1e21)
    grid = np.geomspace(1e7, 1e13, 20001)
    true = TRUE(grid, 1e21 / 6 / grid).min()
    assert abs(found["loss"] / true - 1) < 0.005
    assert found["interval"][0] < found["loss"] < found["interval"][1]
    assert abs(found["n_encoder"] * found["tokens"] * 6 / 1e21 - 1) < 1e-6


def test_the_compute_line_follows_the_best_of_each_budget() -> None:
    budget, n, d, loss = surface(5, 41)
    fitted = fit_runs(table((budget, n, d, loss)), samples=0)
    best = loss.reshape(5, -1).min(axis=1)
    said = law_of(fitted["line"])(np.unique(budget))
    assert np.abs(said / best - 1).max() < 1e-3


def test_held_out_runs_are_predicted_and_not_fitted() -> None:
    rows = table(surface(5, 5, noise=1e-4))
    largest = max(row["budget"] for row in rows)
    for row in rows:
        row["holdout"] = row["budget"] == largest
    fitted = fit_runs(rows, samples=0)
    assert fitted["runs"] == 20 and len(fitted["held_out"]) == 5
    assert max(abs(row["relative_error"]) for row in fitted["held_out"]) < 5e-3
    wrong = [{**row, "loss": row["loss"] * (1.1 if row["holdout"] else 1)} for row in rows]
    assert fit_runs(wrong, samples=0)["surface"] == fitted["surface"]


def test_fit_and_predict_on_a_table_need_no_torch(tmp_path) -> None:
    runs = write(tmp_path / "runs.csv", table(surface(4, 5, noise=1e-3)))
    script = (
        "import sys; from gr.scaling.cli import main\n"
        f"main(['fit', {runs!r}, '--bootstrap', '10']); main(['predict', {runs!r}, '--flops', '1e20'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "at 1e+20 model FLOPs" in done.stdout and "10 times the largest fitted budget" in done.stdout


def test_unfinished_and_diverged_runs_are_left_out_with_their_reason(tmp_path) -> None:
    rows = [{**row, "status": "done", "reason": ""} for row in table(surface(3, 4))]
    rows[0] |= {"status": "diverged", "reason": "loss nan", "loss": ""}
    rows[1] |= {"status": "planned", "loss": ""}
    good, excluded = read_runs(write(tmp_path / "runs.csv", rows) and tmp_path / "runs.csv")
    assert excluded == [("r0", "diverged: loss nan"), ("r1", "planned")] and len(good) == 10


def _mixed(name):
    return lambda rows: [{**row, name: "ab"[i % 2]} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[:5], "needs at least 6 finished runs, and this table has 5"),
        (lambda rows: [{**row, "budget": 1e9} for row in rows], "all runs have the budget 1e+09"),
        (lambda rows: [{**row, "n_encoder": 1e6} for row in rows], "all runs have n_encoder 1e+06"),
        (_mixed("recipe"), "mixes recipe 'a' and 'b'; fit each recipe by itself"),
        (_mixed("eval_hash"), "mixes eval_hash 'a' and 'b'; runs must be judged alike"),
        (_mixed("data_hash"), "mixes data_hash 'a' and 'b'; fit runs of one log only"),
        (_mixed("variant"), "mixes variant 'a' and 'b'; choose one with --variant"),
        (lambda rows: [*rows, rows[3]], "has run r3 twice; every run must stand there once"),
        (lambda rows: [{**row, "loss": "nan"} for row in rows], "run r0 has loss 'nan'; it must be a number above 0"),
        (lambda rows: [{"run_id": row["run_id"]} for row in rows], "has no column 'budget'"),
    ],
)
def test_tables_that_cannot_be_fitted_are_refused(change, sentence, tmp_path, capsys) -> None:
    from gr.errors import run_cli

    runs = write(tmp_path / "runs.csv", change(table(surface(3, 4))))
    assert run_cli(main, ["fit", runs]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_few_runs_have_no_intervals_and_say_so() -> None:
    fitted = fit_runs(table(surface(2, 4)))
    assert (
        fitted["intervals"] is None and "no intervals" in fitted["notes"][0] and "no compute line" in fitted["notes"][1]
    )


def test_runs_of_one_loss_do_not_determine_a_law_and_the_fit_says_so() -> None:
    budget, n, d, loss = surface(3, 4)
    fitted = fit_runs(table((budget, n, d, np.full_like(loss, 2.0))), samples=5)
    assert any("do not determine the law" in note for note in fitted["notes"])


def test_a_best_size_at_the_end_of_those_given_is_marked() -> None:
    fitted = fit_runs(table(surface(3, 4)), samples=0)
    assert predict(fitted, 1e20, [(1e8, 1e9), (1e9, 1e10), (1e10, 1e11)])["at_end"]
    assert not predict(fitted, 1e20)["at_end"]


def test_a_prediction_from_another_table_is_refused(tmp_path, capsys) -> None:
    from gr.errors import run_cli

    runs = write(tmp_path / "runs.csv", table(surface(3, 3)))
    assert run_cli(main, ["predict", runs, "--flops", "1e20"]) == 2
    assert "gr-scaling fit writes it" in capsys.readouterr().err
    assert run_cli(main, ["fit", runs]) == 0
    write(tmp_path / "runs.csv", table(surface(3, 3, noise=1e-3)))
    assert run_cli(main, ["predict", runs, "--flops", "1e20"]) == 2
    assert "is not of" in capsys.readouterr().err
