"""The ways to a law on laws that are known: what each finds, where a parabola is biased, what a fit cannot say.

Thresholds are those measured when the method was specified: an exponent to 0.005 and 0.03 at log-noise 1e-3 and 5e-3,
a hundredfold extrapolation to 0.5 % and 1.5 % at 1e-3 and 3e-3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit

from gr.errors import UserError
from gr.scaling import law as laws
from gr.scaling.bootstrap import seed_noise
from gr.scaling.fit import fit_runs, predict
from gr.scaling.frontier import Price, compare, compute_for
from gr.scaling.isoflop import envelope, optimum_exponents, parabolas
from gr.scaling.law import Law, fit_law
from gr.scaling.projection import project_law
from gr.scaling.quality import best_of_budgets, fit_quality, foretell, quality_of
from gr.scaling.table import read_runs
from test_scaling_fit import TRUE, surface, table, write


@pytest.mark.parametrize(("noise", "threshold"), [(1e-3, 0.005), (3e-3, 0.015)])
def test_a_hundred_times_the_compute_is_predicted_at_either_noise(noise, threshold) -> None:
    fitted = fit_runs(table(surface(5, 7, noise=noise, seed=3)), samples=0)
    grid = np.geomspace(1e7, 1e13, 20001)
    assert abs(predict(fitted, 1e21)["loss"] / TRUE(grid, 1e21 / 6 / grid).min() - 1) < threshold


def test_noise_of_five_thousandths_leaves_the_exponents_to_three_hundredths() -> None:
    _, n, d, loss = surface(5, 9, noise=5e-3, seed=1)
    assert np.abs(np.subtract(fit_law(np.array([n, d]), loss).exponents, TRUE.exponents)).max() < 0.03


@pytest.mark.parametrize("huber", [False, True])
def test_variable_projection_finds_the_law(huber) -> None:
    _, n, d, loss = surface(5, 9)
    law = project_law(np.array([n, d]), loss, huber)
    assert np.abs(np.subtract(law.exponents, TRUE.exponents)).max() < 1e-3 and abs(law.floor - TRUE.floor) < 1e-3


def test_an_outlier_moves_least_squares_and_not_the_huber_fits() -> None:
    _, n, d, loss = surface(5, 9, noise=1e-4)
    loss[3] *= 1.1
    axes = np.array([n, d])
    found = {"squares": project_law(axes, loss), "huber": project_law(axes, loss, True), "lse": fit_law(axes, loss)}
    off = {name: abs(law.exponents[1] - TRUE.exponents[1]) for name, law in found.items()}
    assert off["huber"] < 0.005 and off["lse"] < 0.005 < off["squares"]


def drifting(law: Law) -> list[dict]:
    """Five budgets of nine sizes, wide and further below the optimum with every budget."""
    rows = []
    for i, budget in enumerate(np.logspace(17, 21, 5)):
        grid = np.geomspace(1e5, 1e13, 4001)
        best = grid[np.argmin(law(grid, budget / 6 / grid))]
        for size in best * 10 ** (-0.35 * i / 4) * np.geomspace(1 / 8, 8, 9):
            rows.append((budget, size, budget / 6 / size, float(law(size, budget / 6 / size))))
    return table(np.array(rows).T)


def test_parabolas_are_biased_on_a_drifting_grid_and_the_surface_is_not() -> None:
    law = Law(1.8, (9000.0, 300.0), (0.46, 0.15), 0.0)
    rows, true = drifting(law), 0.15 / (0.46 + 0.15)
    by_parabola = optimum_exponents(parabolas(rows))["n"]
    axes = np.array([[row[name] for row in rows] for name in ("n_encoder", "tokens")])
    alpha, beta = fit_law(axes, np.array([row["loss"] for row in rows])).exponents
    assert abs(beta / (alpha + beta) - true) < 1e-3 < 0.01 < abs(by_parabola - true)


def test_parabolas_of_a_narrow_centred_grid_find_the_exponents() -> None:
    rows = table(surface(4, 7))
    for row in rows:  # about each budget's own optimum, within a factor two
        grid = np.geomspace(1e6, 1e12, 8001)
        best = grid[np.argmin(TRUE(grid, row["budget"] / 6 / grid))]
        row["n_encoder"] = best * 2 ** (float(row["run_id"][1:]) % 7 / 3 - 1)
        row["tokens"] = row["budget"] / 6 / row["n_encoder"]
        row["loss"] = float(TRUE(row["n_encoder"], row["tokens"]))
    found = optimum_exponents(parabolas(rows))
    assert abs(found["n"] - 0.28 / 0.62) < 0.005 and abs(found["n"] + found["tokens"] - 1) < 1e-6


def test_a_budget_without_a_minimum_inside_has_no_parabola() -> None:
    rows = [{"budget": 1e9, "n_encoder": n, "tokens": 1e9 / n, "loss": 5 - np.log10(n)} for n in (1e2, 1e3, 1e4)]
    assert parabolas(rows)[0]["why"] == "no minimum among its sizes"
    assert parabolas(rows[:2])[0]["why"] == "2 sizes, fewer than 3" and optimum_exponents(parabolas(rows)) is None


def test_the_envelope_holds_the_runs_that_nothing_cheaper_matches() -> None:
    runs = [(1e9, 3.0), (1e9, 3.5), (2e9, 3.2), (3e9, 2.5)]
    rows = [{"run_id": str(i), "model_flops": c, "loss": x} for i, (c, x) in enumerate(runs)]
    assert [row["run_id"] for row in envelope(rows)] == ["0", "3"]


def test_a_price_of_scores_and_products_is_found_again() -> None:
    n = np.array([1e3, 1e4, 1e5, 1e6])
    rows = [{"n_encoder": x, "tokens": 7.0, "model_flops": 7.0 * (6 * x + 900 * x**0.5 + 50)} for x in n]
    assert np.allclose(Price.of(rows)(1e7), 6e7 + 900 * 1e7**0.5 + 50, rtol=1e-6)


def test_a_model_that_costs_twice_as_much_a_token_needs_twice_the_compute() -> None:
    rows = table(surface(5, 7, noise=1e-4))
    twice = [{**row, "budget": 2 * row["budget"], "model_flops": 2 * row["model_flops"]} for row in rows]
    for row in compare(fit_runs(rows, samples=20), fit_runs(twice, samples=20)):
        assert abs(row["multiplier"] - 2) < 1e-6 and np.allclose(row["interval"], 2, rtol=1e-6)
    assert compute_for(TRUE, Price((6, 0, 0)), 1.7, np.geomspace(1e5, 1e12, 50)) == np.inf


def test_models_that_share_no_loss_are_not_compared() -> None:
    rows = table(surface(4, 5))
    worse = [{**row, "loss": row["loss"] + 90} for row in rows]
    with pytest.raises(UserError, match="no loss was reached by both"):
        compare(fit_runs(rows, samples=0), fit_runs(worse, samples=0))


def test_a_search_that_does_not_end_is_said_so_and_its_bootstrap_left_out(monkeypatch) -> None:
    rows = table(surface(3, 4, noise=0.05))
    assert not any("converge" in note for note in fit_runs(table(surface(3, 4)), samples=0)["notes"])
    monkeypatch.setattr(laws, "MAX_EVALUATIONS", 1)
    fitted = fit_runs(rows, samples=3)
    assert any("the fit did not converge" in note for note in fitted["notes"])
    assert fitted["bootstrap"] == [] and any("3 of 3 bootstrap fits" in note for note in fitted["notes"])


def seeded(noise: float) -> list[dict]:
    rows = table(surface(4, 5, noise=1e-4))
    draw = np.random.default_rng(5)
    more = [{**row, "run_id": f"{row['run_id']}-{seed}", "loss": row["loss"] * float(np.exp(noise * draw.normal()))}
            for row in rows if row["budget"] == rows[0]["budget"] for seed in range(8)]  # fmt: skip
    return [row for row in rows if row["budget"] != rows[0]["budget"]] + more


def test_the_noise_of_a_seed_is_that_of_the_repeated_cells_and_moves_the_seed_intervals() -> None:
    deviation, freedom = seed_noise(seeded(0.01))
    assert freedom == 35 and 0.007 < deviation < 0.013
    wide, narrow = (fit_runs(seeded(noise), samples=30)["seed_intervals"]["beta"] for noise in (0.01, 0.001))
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert seed_noise(table(surface(3, 4))) is None


def with_metric(rows: list[dict], of_loss) -> list[dict]:
    return [{**row, "hr@10": float(of_loss(row["loss"]))} for row in rows]


def test_a_saturating_metric_is_foretold_by_a_form_that_saturates() -> None:
    rows = with_metric(table(surface(5, 7)), lambda loss: 0.9 - 0.05 * (loss - TRUE.floor))
    fitted = fit_quality(rows, "hr@10")
    assert fitted["form"] == "surface" and fitted["errors"]["surface"] < 1e-3 < fitted["errors"]["line"]
    row = rows[10]
    told = foretell(fitted, row["budget"], row["n_encoder"], row["tokens"])
    assert abs(told["predicted"] - row["hr@10"]) < 1e-3


def test_a_metric_that_is_a_function_of_the_loss_is_recovered_and_foretold_through_it() -> None:
    curve = (0.01, -0.95, 8.0)
    rows = with_metric(table(surface(6, 7)), lambda loss: expit(np.polyval(curve, loss)))
    largest = max(row["budget"] for row in rows)
    fitted = fit_quality([row for row in rows if row["budget"] < largest], "hr@10")
    assert fitted["form"] == "through"
    assert np.allclose(fitted["forms"]["through"]["curve"], curve, atol=1e-4)
    for row in rows:
        if row["budget"] == largest:
            told = foretell(fitted, row["budget"], row["n_encoder"], row["tokens"])
            assert abs(told["predicted"] - row["hr@10"]) < 5e-4


def test_a_metric_that_bends_both_ways_is_foretold_by_its_largest_budgets() -> None:
    """As HR@10 of a planted world: slow at first, then fast, then slow again."""
    rows = table(surface(7, 7))
    losses = np.array([row["loss"] for row in rows])
    middle, half = losses.mean(), np.ptp(losses) / 2
    rows = with_metric(rows, lambda loss: expit(1.5 - 0.8 * np.sin(1.4 * (loss - middle) / half)))
    largest = max(row["budget"] for row in rows)
    fitted = fit_quality([row for row in rows if row["budget"] < largest], "hr@10")
    last = [row for row in rows if row["budget"] == largest]
    through = quality_of(fitted["forms"]["through"])
    wrong = [abs(through(row["budget"], row["n_encoder"], row["tokens"]) - row["hr@10"]) for row in last]
    everywhere = np.polyfit(losses, [logit(row["hr@10"]) for row in rows], 2)  # the last ones seen, too
    misfit = [abs(expit(np.polyval(everywhere, row["loss"])) - row["hr@10"]) for row in last]
    assert np.mean(wrong) < 0.002 and np.mean(misfit) > 0.004


@pytest.fixture(scope="module")
def noisy() -> tuple[list[dict], dict]:
    """Runs of a metric with a noise of 0.004, and its fit."""
    draw = np.random.default_rng(3)
    rows = with_metric(table(surface(5, 7)), lambda loss: 0.9 - 0.05 * (loss - TRUE.floor))
    rows = [{**row, "hr@10": row["hr@10"] + 0.004 * draw.standard_normal()} for row in rows]
    return rows, fit_quality(rows, "hr@10")


def test_a_metric_s_interval_holds_the_noise_of_runs_and_what_the_forms_disagree_by(noisy) -> None:
    rows, fitted = noisy
    assert 0.003 < fitted["scatter"]["surface"] < 0.005
    far = (rows[-1]["budget"] * 100, rows[-1]["n_encoder"] * 10, rows[-1]["tokens"] * 10)
    apart = np.subtract(*(quality_of(fitted["forms"][name])(*far) for name in ("surface", "through"))) / 2
    told = foretell(fitted, *far)
    wide = 1.96 * np.sqrt(fitted["scatter"][told["form"]] ** 2 + fitted["errors"][told["form"]] ** 2 + apart**2)
    assert np.allclose(told["interval"], [told["predicted"] - wide, told["predicted"] + wide]) and apart != 0


def test_every_form_counts_its_own_parameters(noisy) -> None:
    rows, fitted = noisy
    for name, free in (("saturating", 3), ("line", 2)):
        form, best = quality_of(fitted["forms"][name]), best_of_budgets(rows, "hr@10")
        rest = [form(row["budget"], row["n_encoder"], row["tokens"]) - row["hr@10"] for row in best]
        assert np.isclose(fitted["scatter"][name], np.sqrt(np.square(rest).sum() / (len(rest) - free)))


def test_a_metric_that_a_run_lacks_is_not_fitted(tmp_path) -> None:
    rows = [row | {"hr@10": 0.5, "mrr": 0.3} for row in table(surface(3, 4))]
    rows[5]["mrr"] = ""
    fitted = fit_runs(read_runs(Path(write(tmp_path / "runs.csv", rows)))[0], samples=0)
    assert set(fitted["quality"]) == {"hr@10"}


def test_a_held_out_run_lies_inside_its_interval() -> None:
    rows = table(surface(5, 6, noise=2e-3, seed=4))
    for row in rows:
        row["holdout"], row["hr@10"] = row["budget"] > 9e18, 0.9 - 0.05 * (row["loss"] - TRUE.floor)
    for row in fit_runs(rows, samples=40)["held_out"]:
        assert row["run_interval"][0] < row["loss"] < row["run_interval"][1]
        assert abs(row["quality"]["hr@10"]["error"]) < 0.01
