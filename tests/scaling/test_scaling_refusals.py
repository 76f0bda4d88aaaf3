"""What a fit cannot say is not said: searches that do not end, losses that resampled laws never reach, runs that stand
for one cell twice, a study of one budget, a study whose runs all failed."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from gr.errors import run_cli
from gr.scaling import law as laws
from gr.scaling.cli import main
from gr.scaling.fit import fit_runs
from gr.scaling.frontier import Price, multiplier, unreached
from gr.scaling.law import fit_law, law_of
from test_scaling_fit import TRUE, surface, table, write

SIZES = np.geomspace(1e5, 1e12, 200)
PRICE = Price((6, 0, 0))


def test_a_fit_that_did_not_converge_predicts_only_by_force_and_is_not_compared(tmp_path, monkeypatch, capsys) -> None:
    rows = [{**row, "variant": name, "run_id": name + row["run_id"]}
            for name in "ab" for row in table(surface(3, 4, noise=0.05))]  # fmt: skip
    runs = write(tmp_path / "runs.csv", rows)
    monkeypatch.setattr(laws, "MAX_EVALUATIONS", 1)
    assert main(["fit", runs, "--variant", "a", "--bootstrap", "0"]) == 0
    assert "note: the fit did not converge" in capsys.readouterr().out
    ask = ["predict", runs, "--variant", "a", "--flops", "1e20"]
    assert run_cli(main, ask) == 2
    said = capsys.readouterr().err
    assert "did not converge: these runs do not determine the law" in said and said.count("\n") == 1
    assert main([*ask, "--force"]) == 0
    assert run_cli(main, ["compare", runs, "a", "b", "--bootstrap", "0"]) == 2
    said = capsys.readouterr().err  # before the bootstrap's minutes
    assert "the fit of a did not converge" in said and said.count("\n") == 1
    for names, words in ((("a", "c"), "no run of variant 'c'; it has a, b"), (("a", "a"), "a and a are one model")):
        assert run_cli(main, ["compare", runs, *names]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert main(["report", runs, "--bootstrap", "0"]) == 0  # it may be looked at
    assert capsys.readouterr().err == "fitting b, 0 bootstrap samples: no fit of it lies beside the table\n"
    page = (tmp_path / "report.md").read_text()
    assert "the fit did not converge" in page and "a and b: one of the fits did not converge" in page


def resampled(floors: list[float]) -> tuple:
    return TRUE, [dataclasses.replace(TRUE, floor=floor) for floor in floors], PRICE, SIZES


def test_resamples_that_never_reach_a_loss_are_counted_and_leave_no_upper_end() -> None:
    good = [1.8 + 0.001 * i for i in range(90)]
    row = multiplier(resampled([1.8] * 100), resampled([*good, *[2.5] * 10]), 2.2)
    assert row["multiplier"] == 1 and row["unreached"] == [0, 10] and row["samples"] == 100
    low, high = row["interval"]
    assert math.isfinite(low) and high is None
    assert unreached(row, "hstu", "sasrec") == "sasrec never reaches it in 10 of 100 resamples"
    json.dumps(row, allow_nan=False)


def test_resamples_in_which_neither_reaches_a_loss_tell_nothing() -> None:
    row = multiplier(resampled([2.5] * 4), resampled([2.5] * 4), 2.2)
    assert row["interval"] is None and row["unreached"] == [4, 4]
    few = multiplier(resampled([1.8] * 200), resampled([1.8] * 199 + [2.5]), 2.2)
    assert few["interval"] == [1.0, 1.0] and few["unreached"] == [0, 1]  # beyond the 95 %


def test_one_cell_and_seed_from_two_configs_is_refused(tmp_path, capsys) -> None:
    rows = [{**row, "seed": 0, "max_events": 28} for row in table(surface(3, 4))]
    twin = {**rows[2], "run_id": "other", "loss": 2.0}
    assert run_cli(main, ["fit", write(tmp_path / "runs.csv", [*rows, twin])]) == 2
    said = capsys.readouterr().err
    assert "runs r2 and other are one cell and seed, from two configs" in said and said.count("\n") == 1
    for other in ({"seed": 1}, {"max_events": 56}):
        assert main(["fit", write(tmp_path / "runs.csv", [*rows, {**twin, **other}]), "--bootstrap", "0"]) == 0


@pytest.mark.parametrize("status", ["diverged", "failed", "planned", "running", "preempted"])
def test_a_table_without_a_finished_run_is_refused_and_names_how_many(status, tmp_path, capsys) -> None:
    rows = [{**row, "status": status} for row in table(surface(3, 4))]
    assert run_cli(main, ["fit", write(tmp_path / "runs.csv", rows)]) == 2
    assert "at least 6 finished runs, and this table has 0" in capsys.readouterr().err


def test_a_grid_has_a_line_of_its_envelope_and_says_once_that_it_has_no_parabolas() -> None:
    rows = []
    for d in np.geomspace(1e8, 1e10, 5):
        for n in np.geomspace(1e6, 1e8, 4):
            row = {"run_id": f"{n:g}-{d:g}", "n_encoder": n, "tokens": d, "budget": 6 * n * d, "model_flops": 6 * n * d}
            rows.append(row | {"loss": float(TRUE(n, d * (1 + 1e-3 * n / 1e8))), "holdout": False})
    fitted = fit_runs(rows, samples=0)
    assert sum("parabola" in note for note in fitted["notes"]) == 1
    on = sorted((row for row in rows if row["run_id"] in fitted["envelope"]), key=lambda row: row["budget"])
    assert 4 <= len(on) < len(rows)
    alone = fit_law(np.array([[row["budget"] for row in on]]), np.array([row["loss"] for row in on]))
    assert law_of(fitted["line"]) == alone


def test_excluded_runs_are_printed_with_their_reason(tmp_path, capsys) -> None:
    rows = [{**row, "status": "done", "reason": ""} for row in table(surface(3, 4))]
    rows[0] |= {"status": "diverged", "reason": "loss nan at step 7"}
    rows[1] |= {"status": "preempted"}
    assert main(["fit", write(tmp_path / "runs.csv", rows), "--bootstrap", "0"]) == 0
    said = capsys.readouterr().out
    assert "excluded r0: diverged: loss nan at step 7\n" in said and "excluded r1: preempted\n" in said
    told = json.loads((tmp_path / "fits.json").read_text())
    assert told["runs"] == 10 and told["excluded"] == [["r0", "diverged: loss nan at step 7"], ["r1", "preempted"]]
