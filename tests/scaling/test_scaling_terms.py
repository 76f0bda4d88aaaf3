"""Terms in length, sparse capacity and repeated data are found again where they were planted, and refused where a table
cannot tell them."""

from __future__ import annotations

import numpy as np
import pytest

from gr.errors import run_cli
from gr.scaling.cli import main
from gr.scaling.law import fit_law
from gr.scaling.terms import fit_term, worth
from test_scaling_fit import TRUE, surface, table, write

THIRD, GAMMA = {"length": 3.0, "sparse": 1e3}, 0.5
PASSES = 15.0  # R


def rows_of(term: str, noise: float = 0.0) -> list[dict]:
    """Four budgets of four sizes at four values of a term's axis."""
    _, n, d, _ = surface(4, 4)
    draw, rows = np.random.default_rng(2), []
    for x in {"length": (8, 32, 128, 512), "sparse": (1e5, 1e6, 1e7, 1e8), "repeats": (0.5, 4.0, 16.0, 64.0)}[term]:
        for row in table(surface(4, 4)):
            row = {
                **row,
                "run_id": f"{row['run_id']}-{x:g}",
                "pairs": 20 * row["tokens"],
                "n_sparse": 1e6,
                "epochs": 0.5,
            }
            n, d, more = row["n_encoder"], row["tokens"], 0.0
            if term == "repeats":
                row["epochs"] = x * (row["tokens"] / 1e9) ** 0.2
                d = float(worth(np.array(d), np.array(row["epochs"]), PASSES))
            else:
                row |= {"pairs": x * d} if term == "length" else {"n_sparse": x}
                more = THIRD[term] * x**-GAMMA
            row["loss"] = float((TRUE(n, d) + more) * np.exp(noise * draw.standard_normal()))
            rows.append(row)
    return rows


@pytest.mark.parametrize("term", ["length", "sparse"])
@pytest.mark.parametrize(("noise", "off"), [(0.0, 1e-3), (1e-3, 0.03)])
def test_an_added_term_is_found_again(term, noise, off) -> None:
    found = fit_term(rows_of(term, noise), term, samples=20 if noise else 0)
    assert np.abs(np.subtract(found["law"]["exponents"], (*TRUE.exponents, GAMMA))).max() < off
    assert abs(found["law"]["floor"] - TRUE.floor) < 0.05 and found["values"] == 4
    assert found["plain"] > 3 * found["law"]["objective"]
    if noise:
        low, high = found["intervals"]["gamma"]
        assert low < GAMMA < high and high - low < 0.1


@pytest.mark.parametrize(("noise", "off"), [(0.0, 0.01), (1e-3, 0.15)])
def test_what_repeats_are_worth_is_found_again(noise, off) -> None:
    found = fit_term(rows_of("repeats", noise), "repeats", samples=10 if noise else 0)
    assert abs(found["worth"] / PASSES - 1) < off
    assert np.abs(np.subtract(found["law"]["exponents"], TRUE.exponents)).max() < 0.01
    if noise:
        assert found["intervals"]["R"][0] < PASSES < found["intervals"]["R"][1]


def test_a_second_pass_is_worth_almost_a_first_and_a_hundredth_nothing() -> None:
    once, twice, often, ever = worth(np.array([1.0, 2.0, 100.0, 1e4]), np.array([0.7, 2.0, 100.0, 1e4]), PASSES)
    assert once == 1.0 and 1.95 < twice < 2.0 and 15.9 < often < ever <= 16.0


def test_a_term_that_is_not_there_is_said_to_explain_little() -> None:
    rows = rows_of("length", 1e-3)
    for row, plain in zip(rows, rows_of("sparse", 1e-3), strict=True):
        row["loss"] = plain["loss"] - THIRD["sparse"] * plain["n_sparse"] ** -GAMMA
    found = fit_term(rows, "length", samples=0)
    assert any("explains little" in note for note in found["notes"])
    assert fit_law(np.array([[row[k] for row in rows] for k in ("n_encoder", "tokens")]), np.array(
        [row["loss"] for row in rows])).objective == found["plain"]  # fmt: skip


@pytest.mark.parametrize(
    ("term", "change", "sentence"),
    [
        ("length", lambda rows: rows[:11], "term length needs at least 12 finished runs, and this table has 11"),
        ("length", lambda rows: rows[:32], "at least 3 values of its axis, and this table has 2 (a design of kind"),
        ("sparse", lambda rows: [{**row, "n_sparse": ""} for row in rows], "term sparse needs the column 'n_sparse'"),
        ("length", lambda rows: [{k: v for k, v in row.items() if k != "pairs"} for row in rows], "column 'pairs'"),
        ("repeats", lambda rows: [{**row, "epochs": 0.5} for row in rows], "this table has 0 over 0 (a"),
        (
            "repeats",  # one amount of data: more passes are more tokens, and nothing else
            lambda rows: [{**row, "epochs": row["tokens"] / 1e8} for row in rows],
            " over 1 (a design of kind data has them)",
        ),
        (
            "length",  # grows with N alone
            lambda rows: [{**row, "pairs": row["tokens"] * (row["n_encoder"] / 1e6) ** 0.5} for row in rows],
            "term length's axis follows from N and D in these runs",
        ),
    ],
)
def test_tables_that_cannot_tell_a_term_are_refused(term, change, sentence, tmp_path, capsys) -> None:
    runs = write(tmp_path / "runs.csv", change(rows_of(term)))
    assert run_cli(main, ["fit", runs, "--term", term, "--bootstrap", "0"]) == 2  # before anything is fitted
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_fit_with_a_term_writes_it_draws_it_and_says_what_the_surface_leaves_out(tmp_path, capsys) -> None:
    rows = [{**row, "max_events": round(row["pairs"] / row["tokens"])} for row in rows_of("length", 1e-3)]
    runs = write(tmp_path / "runs.csv", rows)
    assert main(["fit", runs, "--bootstrap", "0", "--term", "length"]) == 0
    said = capsys.readouterr().out
    assert "term length: gamma 0.5" in said
    assert "note: runs read 4 lengths of history, which L(N, D) leaves out" in said
    assert '"length"' in (tmp_path / "fits.json").read_text()
    assert main(["report", runs, "--bootstrap", "0"]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "## Further terms" in page and "length.svg" in page
