"""``plot`` and ``report``: every figure beside its CSV, both pages, the checklist, what was left out; no torch."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

from gr.errors import run_cli
from gr.scaling.cli import main
from gr.scaling.report import Section, html, markdown
from small_study import ROOT
from test_scaling_fit import TRUE, surface, table, write


def test_a_report_of_two_models_needs_no_torch_and_holds_every_figure_with_its_csv(tmp_path) -> None:
    rows = []
    for name, share in (("hstu", 1.0), ("sasrec", 1.05)):
        for row in table(surface(4, 4, noise=1e-3)):
            row |= {"run_id": name + row["run_id"], "variant": name, "status": "done", "reason": ""}
            row |= {"loss": share * row["loss"], "holdout": int(row["budget"] > 9e18), "steps": 100, "eval_hash": "e1"}
            row |= {"max_events": 8 + len(rows) % 2, "pairs": 6 * row["tokens"], "recipe": "r-1"}
            row |= {"flops_dense": 5, "flops_attention": 3, "flops_head": 2}
            rows.append(row | {"hr@10": 0.9 - 0.05 * (row["loss"] - TRUE.floor)})
    rows[1] |= {"status": "diverged", "reason": "loss nan", "loss": ""}
    runs = write(tmp_path / "runs.csv", rows)
    write(tmp_path / "timings.csv", [{"run_id": row["run_id"], "train_seconds": 7, "code": "c0ffee"} for row in rows])
    script = (
        f"import sys; from gr.scaling.cli import main; assert main(['report', {runs!r}, '--bootstrap', '3']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = sorted((tmp_path / "figures").glob("*.svg"))
    names = {path.stem for path in figures}
    assert {"multiplier", "hstu_isoflop", "hstu_loss_compute", "sasrec_optimum", "sasrec_predicted"} <= names
    shipped = re.findall(r"--figure (\w+)", (ROOT / "configs/scaling/README.md").read_text())
    assert len(shipped) == 12 and all(name in names or f"sasrec_{name}" in names for name in shipped)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page.count("<svg") == len(figures) and "<script" not in page
    for path in figures:
        with open(path.with_suffix(".csv"), newline="") as file:
            assert len(list(csv.DictReader(file))) >= 3
        assert f"figures/{path.name}" in text
    for words in (
        "What is N",
        "Objective",
        "Which checkpoints",
        "diverged: loss nan",
        "sasrec against hstu",
        "commit c0ffee",
        "evaluation e1, the same targets",
        "31 finished, 1 left out",
    ):
        assert words in text and words in page
    # The held-out losses of the page are those of the table.
    held = [row for row in rows if row["holdout"] and row["variant"] == "hstu"]
    assert len(held) == 4 and all(f"| {row['loss']:.4f} |" in text for row in held)


def test_one_figure_is_drawn_by_its_name_and_an_unknown_one_is_refused(tmp_path, capsys) -> None:
    runs = write(tmp_path / "runs.csv", table(surface(2, 4)))
    assert main(["plot", runs, "--figure", "isoflop", "--bootstrap", "0"]) == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["isoflop.csv", "isoflop.svg"]
    assert run_cli(main, ["plot", runs, "--figure", "pie", "--bootstrap", "0"]) == 2
    assert "has no figure 'pie'; it has loss_compute, isoflop, optimum" in capsys.readouterr().err


def test_what_a_table_says_is_text_and_never_markup() -> None:
    section = [Section("Left out", head=["run"], rows=[["<b>|</b>"]])]
    assert "&lt;b&gt;" in html("x", section) and "<b>\\|</b>" in markdown("x", section)
