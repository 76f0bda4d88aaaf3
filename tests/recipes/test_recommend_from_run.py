"""``gr-recommend`` on a run that ``gr-train`` made: the same model, the same ranks."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr.errors import run_cli
from gr.evaluation.saved_ranks import load_ranks
from gr.inference.cli import main
from gr.inference.load import load_run
from gr.inference.recommend import recommend
from tiny_runs import run_here


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommend")
    run_here(folder)
    return folder / "runs" / "tiny"


def test_held_out_items_rank_as_the_evaluation_said(run_dir):
    loaded = load_run(run_dir)
    ranks = load_ranks(run_dir / "ranks_test.parquet")
    for row in np.arange(0, len(ranks), 37):
        user = loaded.store.user_ids[int(ranks.user[row])].as_py()
        found = recommend(loaded, user=user, k=5)
        assert found.held_out.rank == ranks.rank[row], user
        assert len(found.rows) == 5


def test_an_item_that_may_not_be_shown_ranks_behind_all_that_may(run_dir):
    loaded = load_run(run_dir)
    ranks = load_ranks(run_dir / "ranks_test.parquet")
    items = loaded.store.columns["item_id"]
    for row in range(len(ranks)):
        start = loaded.store.offsets[ranks.user[row]]
        past = set(items[start : start + ranks.position[row]].tolist())
        if ranks.target[row] in past:
            user = loaded.store.user_ids[int(ranks.user[row])].as_py()
            found = recommend(loaded, user=user, k=5, include_seen=False)
            assert found.held_out.rank == found.held_out.candidates == loaded.store.num_items - len(past) + 1
            return
    pytest.fail("no test user repeats an item; make the world smaller")


def test_the_command_shows_history_recommendations_and_what_came_next(run_dir, capsys):
    assert run_cli(main, [str(run_dir), "--k", "3"]) == 0
    out = capsys.readouterr().out
    assert "Recommended" in out and "What came next (test):" in out and " of 120." in out
    assert run_cli(main, [str(run_dir), "--history", "Noir Classics No. 1; Space Classics No. 2"]) == 0
    assert "Your history" in capsys.readouterr().out


def test_an_unknown_user_or_title_is_one_sentence(run_dir, capsys):
    for arguments, words in (
        (["--user", "99999"], "99999"),
        (["--history", "Noir Clasics No. 1"], "Noir Classics No. 1"),
        (["--k", "0"], "--k is 0"),
        (["--device", "tpu"], "--device"),
        (["--at", "9" * 30], "out of range"),
        (["--at", "yesterday"], "is not a time"),
    ):
        assert run_cli(main, [str(run_dir), *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err
    assert run_cli(main, [str(run_dir.parent / "absent")]) == 2


def test_a_file_for_all_users_agrees_with_each_user_alone(run_dir, tmp_path, capsys):
    out = tmp_path / "recs.parquet"
    assert run_cli(main, [str(run_dir), "--users", "all", "--out", str(out), "--k", "5", "--titles"]) == 0
    assert "300 users" in capsys.readouterr().out
    loaded, rows = load_run(run_dir), pq.read_table(out).to_pylist()
    assert [row["user_id"] for row in rows] == loaded.store.user_ids.to_pylist()
    for row in rows[::29]:
        alone = recommend(loaded, user=row["user_id"], k=5).rows
        assert row["items"] == [one.item_id for one in alone]
        assert row["titles"] == [one.title for one in alone]
        np.testing.assert_allclose(row["scores"], [one.score for one in alone], rtol=1e-5)
    for arguments, words in (
        (["--users", "all"], "--users and --out go together"),
        (["--out", str(out)], "--users and --out go together"),
        (["--titles"], "--titles goes with --users"),
        (["--users", "0,999", "--out", str(out)], "1 of 2 users are not in the log"),
        (["--users", "all", "--out", str(tmp_path / "no" / "o")], "its folder does not exist"),
        (["--users", "all", "--user", "1", "--out", str(out)], "not allowed with"),
    ):
        assert run_cli(main, [str(run_dir), *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err
