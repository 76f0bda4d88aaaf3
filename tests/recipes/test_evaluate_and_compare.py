"""``gr-evaluate`` and ``gr-compare`` on runs that ``gr-train`` made."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from gr import compare as compare_command
from gr import evaluate as evaluate_command
from gr.errors import UserError, run_cli
from gr.evaluation.metrics import per_target
from gr.evaluation.saved_ranks import load_ranks
from gr.evaluation.significance import compare
from gr.recipes.comparison import MIN_USERS, compare_runs
from gr.recipes.evaluation import evaluate
from tiny_runs import WORLD, run_here


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with runs ``tiny`` and ``other`` (another seed); config changes that would need training are faked."""
    folder = tmp_path_factory.mktemp("judged")
    run_here(folder)
    run_here(folder, "--name", "other", "--seed", "1", "--train.epochs", "1")
    return folder / "runs"


def read(path):
    return json.loads(path.read_text())


def test_the_same_rule_gives_the_runs_own_numbers_and_leaves_its_files_alone(runs):
    before = (runs / "tiny" / "results.json").read_bytes()
    results, place = evaluate(runs / "tiny")
    assert place == runs / "tiny" / "evaluations" / "test-keep"
    own = json.loads(before)
    assert results["metrics"] == own["metrics"] and results["ceiling"] == own["ceiling"]
    assert results["comparison"] == own["comparison"] and results["audit"] == []
    assert read(place / "results.json") == json.loads(json.dumps(results))
    ranks, saved = load_ranks(place / "ranks.parquet"), load_ranks(runs / "tiny" / "ranks_test.parquet")
    np.testing.assert_array_equal(ranks.better, saved.better)
    assert (runs / "tiny" / "results.json").read_bytes() == before


def test_rules_parts_and_checkpoints_have_a_folder_each_and_different_candidates(runs):
    folders, candidates = set(), []
    for options in (
        {"seen": "mask"},
        {"seen": "window"},
        {"part": "valid", "baselines": False},
        {"checkpoint": "last"},
    ):
        results, place = evaluate(runs / "tiny", ks=(10, 20), **options)
        folders.add(place.name)
        candidates.append(load_ranks(place / "ranks.parquet").candidates.mean())
        assert set(results["metrics"]["HSTU"]) == {"hr@10", "hr@20", "ndcg@10", "ndcg@20", "mrr"}
        assert len(results["metrics"]) == (1 if options.get("baselines") is False else 3)
    assert folders == {"test-mask", "test-window", "valid-keep", "test-keep-last"}
    # The layout reads 12 events and no history is longer, so here the window is all of it.
    assert candidates[0] == candidates[1] < candidates[2] == candidates[3] == 120
    assert "chose the checkpoint" in " ".join(
        read(runs / "tiny/evaluations/valid-keep/results.json")["data"]["caveats"]
    )


def test_slices_are_means_over_their_targets(runs):
    results, place = evaluate(runs / "tiny")
    ranks = load_ranks(place / "ranks.parquet")
    slices = results["slices"]["HSTU"]
    hits = per_target(ranks, "hr@10")
    for group in ("history", "popularity", "repeat"):
        parts = [one for one in slices if one["group"] == group]
        assert sum(one["num"] for one in parts) == len(ranks)
        mean = sum(one["num"] * one["metrics"]["hr@10"]["mean"] for one in parts) / len(ranks)
        assert mean == pytest.approx(hits.mean())
    low, high = map(int, re.findall(r"\d+", slices[0]["name"]))
    rows = (ranks.position >= low) & (ranks.position <= high)
    assert slices[0]["metrics"]["hr@10"]["mean"] == pytest.approx(hits[rows].mean())


def test_the_command_prints_intervals_slices_and_a_warning_about_few_users(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run_cli(evaluate_command.main, [str(runs / "tiny"), "--ks", "1,10"]) == 0
    out = capsys.readouterr().out
    for words in ("HR@1 ", "NDCG@10", "95 %", "Popularity", "best possible", "head items", "not seen before",
                  "only 300 targets", "weights: best.pt, step", "leak audit: nothing found", "test-keep"):  # fmt: skip
        assert words in out, out


def test_two_runs_compare_as_their_ranks_do_and_seeds_are_averaged_by_user(runs, tmp_path, capsys):
    a, b = (load_ranks(runs / name / "ranks_test.parquet") for name in ("tiny", "other"))
    found = compare_runs(str(runs / "tiny"), f"{runs / 'tiny'}:markov", samples=500)
    rival = load_ranks(runs / "tiny" / "stages" / "baselines" / "ranks_markov.parquet")
    direct = compare(a, rival, "ndcg@10", samples=500)
    assert (found["difference"]["difference"], found["difference"]["p"]) == (direct.difference, direct.p_value)
    assert found["difference"]["p"] >= 2 / 501

    seed1 = tmp_path / "seed1"
    shutil.copytree(runs / "other", seed1)  # its config, but for the seed, made that of ``tiny``
    text = (seed1 / "config.yaml").read_text()
    config = yaml.safe_load(text)
    config["train"]["epochs"] = 2
    (seed1 / "config.yaml").write_text(text.partition("\n")[0] + "\n" + yaml.safe_dump(config))
    target = tmp_path / "found.json"
    arguments = [f"{runs / 'tiny'},{seed1}", f"{runs / 'tiny'}:markov", "--slices", "--samples", "300"]
    assert run_cli(compare_command.main, [*arguments, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "seed 0: " in out and "seed 1: " in out and "sd over seeds" in out and "for these very seeds" in out
    found = read(target)
    mean = (per_target(a, "ndcg@10") + per_target(b, "ndcg@10")) / 2
    gap = mean - per_target(rival, "ndcg@10")
    assert found["difference"]["difference"] == pytest.approx(gap.mean())
    scores = [run["score"] for run in found["a"]["runs"]]
    assert found["a"]["sd_over_seeds"] == pytest.approx(np.std(scores, ddof=1))
    for row in found["slices"]:
        assert row["difference"] == pytest.approx(row["a"] - row["b"])
        assert (row["p"] is None) == (row["users"] < MIN_USERS)
        assert row["p"] is None or row["p"] <= row["p_holm"] <= 1
    for group in ("history", "popularity", "repeat"):
        rows = [row for row in found["slices"] if row["group"] == group]
        assert sum(row["num"] * row["difference"] for row in rows) / 300 == pytest.approx(gap.mean())


def test_rankings_that_cannot_be_compared_say_in_what_they_differ(runs, tmp_path):
    evaluate(runs / "tiny", seen="mask", baselines=False)
    evaluate(runs / "tiny", part="valid", baselines=False)
    tiny = str(runs / "tiny")
    run_here(tmp_path, "--train.epochs", "1", "--train.max_steps", "1", data={**WORLD, "seed": 9})
    run_here(
        tmp_path, "--train.epochs", "1", "--train.max_steps", "1", "--name", "loo", "--split.min_train_events", "5"
    )
    here = tmp_path / "runs"
    for a, b, words in (
        (tiny, f"{tiny}@test-mask", "rule for items already seen: keep and mask; gr-evaluate"),
        (tiny, f"{tiny}@valid-keep", "part of the split: test and valid"),
        (tiny, str(here / "tiny"), "data (content hash)"),
        (tiny, str(here / "loo"), "split"),
        (f"{tiny},{tiny}", tiny, "seed 0 twice"),
        (f"{tiny},{runs / 'other'}", tiny, "differ in more than the seed"),
        (f"{tiny}:markov,{runs / 'other'}:markov", tiny, "differ in more than the seed"),
        (tiny, f"{tiny}:itemknn", "'itemknn' is no baseline"),
        (tiny, f"{tiny}:item_knn", "was not judged there"),
        (tiny, f"{tiny}@test-msk", "no evaluation 'test-msk'; there is"),
        (tiny, f"{tiny}@test-mask:markov", "was not judged there"),
        (tiny, str(runs / "absent"), "absent does not exist"),
        (",", tiny, "names no run"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            compare_runs(a, b)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("evaluate", ["RUN/absent"], "absent does not exist"),
        ("evaluate", ["RUN/tiny", "--ks", "1,5"], "--ks is '1,5'"),
        ("evaluate", ["RUN/tiny", "--ks", "ten"], "--ks is 'ten'"),
        ("evaluate", ["RUN/tiny", "--seen", "hide"], "--seen"),
        ("evaluate", ["RUN/tiny", "--part", "train"], "--part"),
        ("evaluate", ["RUN/untrained"], "no finished model"),
        ("evaluate", ["RUN/untrained", "--checkpoint", "best"], "no best.pt"),
        ("compare", ["RUN/tiny"], "B"),
        ("compare", ["RUN/tiny", "RUN/untrained"], "its training has not finished"),
        ("compare", ["RUN/tiny", "RUN/other", "--metric", "recall@10"], "metric 'recall@10' is unknown"),
        ("compare", ["RUN/tiny", "RUN/other", "--samples", "3"], "--samples is 3"),
        (
            "compare",
            ["RUN/tiny", "RUN/other", "--samples", "100", "--json", "RUN/tiny/config.yaml/x.json"],
            "config.yaml",
        ),
    ],
)
def test_each_mistake_is_one_sentence_and_exit_status_2(runs, capsys, command, arguments, words):
    untrained = runs / "untrained"
    if not untrained.exists():
        untrained.mkdir()
        for name in ("config.yaml", "data.json"):
            shutil.copy(runs / "tiny" / name, untrained)
    main = {"evaluate": evaluate_command.main, "compare": compare_command.main}[command]
    assert run_cli(main, [word.replace("RUN", str(runs)) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_a_split_without_validation_has_no_valid_part_to_judge(tmp_path):
    run_here(tmp_path, "--train.max_steps", "1", "--train.early_stopping", "null", split={"kind": "paper"})
    with pytest.raises(UserError, match="no validation targets; use --part test"):
        evaluate(tmp_path / "runs" / "tiny", part="valid")
    results, _ = evaluate(tmp_path / "runs" / "tiny", seen="mask")
    assert set(results["metrics"]) == {"HSTU", "Popularity", "Markov"}


def test_no_number_is_cut_however_narrow_the_terminal(capsys):
    from rich.console import Console

    from gr.recipes.summary import _plain_table, _print_whole

    table = _plain_table("t", [f"HR@{k}" for k in range(10)])
    table.add_row("HSTU", *["0.12345"] * 10)
    _print_whole(Console(width=40), table)
    assert capsys.readouterr().out.count("0.12345") == 10
