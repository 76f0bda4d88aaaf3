"""The benchmark scripts run and say what they claim; their figures are no business of tests."""

from __future__ import annotations

import json

from benchmarks.train import quality, run


def test_step_ratios_are_relative_to_the_first_provider():
    rows = run.measure(["hstu", "sasrec"], repeats=2, steps=1)
    assert [row["provider"] for row in rows] == ["hstu", "sasrec"]
    assert rows[0]["low"] == rows[0]["median"] == rows[0]["high"] == 1.0
    assert rows[1]["low"] <= rows[1]["median"] <= rows[1]["high"]


def test_every_variant_and_provider_loads_and_differs():
    hashes = {quality.configs.config_hash(quality.load(variant, 0, [])) for variant in quality.VARIANTS}
    assert len(hashes) == len(quality.VARIANTS)
    assert set(quality.VARIANTS) < set(run.PROVIDERS)


def test_the_learning_rate_is_the_best_on_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "TUNED", tmp_path / "tuned.jsonl")
    assert quality.chosen("hstu") == []
    for rate, value in ((0.001, 0.1), (0.002, 0.3), (0.004, 0.2)):
        digest = quality.configs.config_hash(quality.tuning("hstu", rate))
        quality.append_row(quality.TUNED, {"config_hash": digest, "valid_ndcg@10": value})
    assert quality.chosen("hstu") == ["--train.optimizer.lr", "0.002"]
    assert quality.chosen("sasrec") == []


def test_committed_quality_rows_meet_what_readme_says_of_the_quick_start():
    """Accepted: baselines at most 65 % of the best possible, HSTU at least 90 %, blind models 3 points below it."""
    rows = quality.rows(quality.ROWS)
    assert rows and all(row["audit"] == [] for row in rows)
    hits = {v: [r["model"]["hr@10"]["mean"] for r in rows if r["variant"] == v] for v in quality.VARIANTS}
    best = rows[0]["ceiling"]["hr@10"]
    assert len(hits["hstu"]) >= 3 and min(hits["hstu"]) >= 0.9 * best
    assert max(m["hr@10"]["mean"] for row in rows for m in row["baselines"].values()) <= 0.65 * best
    for blind in ("hstu_no_time", "sasrec", "transformer"):
        assert len(hits[blind]) >= 3 and max(hits[blind]) <= min(hits["hstu"]) - 0.03
    assert json.dumps(rows)
