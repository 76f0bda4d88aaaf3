"""Rows and tables of runs on real data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.real import record, search, tables
from gr.evaluation.metrics import means
from gr.evaluation.ranking import Ranks


def ranks(better, tied=0):
    n = np.arange(len(better))
    return Ranks(n, n + 3, n % 5, np.array(better), np.full(len(better), tied), np.full(len(better), 90), 100)


def test_kept_ranks_give_every_metric_again_and_tell_other_targets_apart_without_naming_items(tmp_path):
    one, other = ranks([0, 4, 30, 9], tied=2), ranks([5, 4, 3, 2])
    for found, name in ((one, "a"), (other, "b")):
        record.keep_ranks(found, tmp_path / name)
    kept, targets = record.kept_ranks(tmp_path / "a")
    assert means(kept) == means(one) and kept.num_items == 100
    assert targets == record.kept_ranks(tmp_path / "b")[1]
    moved = Ranks(one.user, one.position + 1, one.target, one.better, one.tied, one.candidates, 100)
    record.keep_ranks(moved, tmp_path / "c")
    assert record.kept_ranks(tmp_path / "c")[1] != targets
    assert set(record.pq.read_table(tmp_path / "a").column_names) == set(record.KEPT)


def test_an_epochs_loss_is_the_mean_of_its_steps_and_its_scores_stand_beside_it(tmp_path):
    lines = [{"epoch": 0, "loss": 3.0}, {"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0}]
    lines.append({"epoch": 1, "evaluation": {"hr@10": 0.5, "ndcg@10": 0.25, "mrr": 0.2}})
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record.epochs(tmp_path / "m") == [
        {"epoch": 1, "loss": 2.5},
        {"epoch": 2, "loss": 1.0, "hr@10": 0.5, "ndcg@10": 0.25},
    ]


def test_a_row_names_files_but_not_where_they_lay():
    config = {"runs": "/a/runs", "seed": 1, "data": {"path": "/a/b/log.csv", "items": {"path": "/c/items.csv"}}}
    assert record.portable(config) == {"seed": 1, "data": {"path": "log.csv", "items": {"path": "items.csv"}}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two seeds of model m, one of model n, and a counting baseline judged with m."""
    rows = {}
    scores = {"m-s0": [0, 1, 2, 40], "m-s1": [0, 1, 50, 40], "n-s0": [60, 70, 80, 90]}
    for name, better in scores.items():
        found = {k: {"mean": v} for k, v in means(ranks(better), (5, 10)).items()}
        metrics = {"mask": {"HSTU": found, "ItemKNN": found}}
        rows[name] = {"run": name, "seed": int(name[-1]), "label": "HSTU", "metrics": metrics}
        record.keep_ranks(ranks(better), tmp_path / f"{name}.mask.parquet")
        record.keep_ranks(ranks(better), tmp_path / f"{name}.mask.item_knn.parquet")
    monkeypatch.setattr(tables, "rows", lambda: rows)
    monkeypatch.setattr(tables, "RANKS", tmp_path)
    monkeypatch.setattr(tables, "COMPARISONS", tmp_path / "tests.json")
    return tuple(tables.Group(f"Model {name}", name, "mask") for name in ("m", "n", "m:item_knn", "absent"))


def test_a_table_gives_the_mean_over_seeds_and_their_deviation(results):
    lines = tables.table(results, (5, 10)).splitlines()
    assert lines[2].startswith("| Model m | 2 | 0.6250 | 0.1768 |")
    assert lines[3].startswith("| Model n | 1 | 0.0000 |  |") and lines[4].startswith(
        "| Model m:item_knn | - | 0.7500 |"
    )
    assert len(lines) == 5


def test_a_test_pairs_the_users_means_over_seeds(results, monkeypatch):
    monkeypatch.setattr(tables, "TESTS", ((results[0], results[1]), (results[0], results[3])))
    made = tables.comparisons()
    assert list(made) == ["m - n"] and made["m - n"]["hr@10"]["difference"] == 0.625
    tables.COMPARISONS.write_text(json.dumps(made))
    assert tables.made(results[0], results[1]) and not tables.made(results[0], results[3])
    assert tables.sentence(results[0], results[1], "hr@10").startswith("Model m less Model n, HR@10: +0.6250 (95 % ")


def test_the_search_page_says_what_each_run_changes():
    base = {"source": "beauty", "best": {"epoch": 2, "hr@10": 0.1, "ndcg@10": 0.05}, "epochs": 4}
    searched = (("hstu", 0.1), ("hstu", 0.2), ("transformer", 0.3))
    configs = [{"model": {"encoder": {"kind": kind}}, "train": {"lr": lr, "epochs": 4}} for kind, lr in searched]
    rows = [{**base, "run": f"t{i}", "config": config} for i, config in enumerate(configs)]
    lines = search.page(rows, "notes").splitlines()
    assert "## beauty, `hstu`" in lines and "| t2 | (start) | 4 | 2 | 0.1000 | 0.0500 |" in lines
    assert "| t0 | (start) | 4 | 2 | 0.1000 | 0.0500 |" in lines
    assert "| t1 | `train.lr` 0.2 | 4 | 2 | 0.1000 | 0.0500 |" in lines and lines[-1] == "notes"


def test_committed_rows_and_tests_are_what_the_ranks_say():
    found = record.rows()
    assert found, "rows are committed"
    for row in found.values():
        assert not row["audit"] and '"/' not in json.dumps(row["config"]) and not row["git_dirty"], row["run"]
        for rule, metrics in row["metrics"].items():
            ranks, _ = record.kept_ranks(record.RANKS / f"{row['run']}.{rule}.parquet")
            assert means(ranks)["ndcg@10"] == pytest.approx(metrics[row["label"]]["ndcg@10"]["mean"], abs=1e-6)
    assert json.loads(tables.COMPARISONS.read_text()) == tables.comparisons()
