"""Recommendations for many users: the same as for each alone, in one whole file."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.errors import UserError
from gr.inference import batch
from gr.inference.batch import find_users, recommend_all
from gr.inference.recommend import recommend
from test_recommend import DAY, loaded


def read(path):
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("include_seen", [None, True, False])
@pytest.mark.parametrize("size", [1, 256])
def test_the_file_holds_what_each_user_alone_would_be_shown(tmp_path, monkeypatch, include_seen, size):
    monkeypatch.setattr(batch, "USERS", size)
    run = loaded(actions=True, kind="interleaved", mask_seen=True)
    none = recommend_all(run, find_users(run, "all"), tmp_path / "o", k=4, include_seen=include_seen, titles=True)
    rows = read(tmp_path / "o")
    assert none == 0 and [row["user_id"] for row in rows] == ["ann", "bob"]
    for row in rows:
        alone = recommend(run, user=row["user_id"], k=4, include_seen=include_seen).rows
        assert row["items"] == [one.item_id for one in alone]
        assert row["titles"] == [one.title for one in alone]
        assert row["scores"] == [one.score for one in alone]
    assert include_seen or len(rows[0]["items"]) == 2 < len(rows[1]["items"])  # ann has had 4 of the 6 items


def test_ids_keep_their_types_and_users_their_order(tmp_path):
    run = loaded(times=False)
    recommend_all(run, find_users(run, "bob, ann"), tmp_path / "o", k=2)
    table = pq.read_table(tmp_path / "o")
    assert table["user_id"].to_pylist() == ["bob", "ann"] and table.column_names == ["user_id", "items", "scores"]
    assert table.schema.field("items").type == pa.list_(pa.int64())
    assert table.schema.field("scores").type == pa.list_(pa.float32())


def test_as_of_a_time_and_users_without_an_earlier_event_get_empty_lists(tmp_path):
    run = loaded()
    assert recommend_all(run, find_users(run, "all"), tmp_path / "o", k=3, at=2 * DAY) == 1
    rows = read(tmp_path / "o")
    assert rows[0]["items"] == [one.item_id for one in recommend(run, user="ann", k=3, at=2 * DAY)]
    assert rows[1]["items"] == rows[1]["scores"] == []
    assert recommend_all(run, np.array([1]), tmp_path / "o", k=3, at=DAY) == 1
    assert read(tmp_path / "o") == [{"user_id": "bob", "items": [], "scores": []}]


def test_row_groups_are_written_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "USERS", 3)
    monkeypatch.setattr(batch, "ROW_GROUP", 6)
    run = loaded()
    recommend_all(run, np.tile([0, 1], 10), tmp_path / "o", k=1)
    assert [pq.ParquetFile(tmp_path / "o").metadata.row_group(i).num_rows for i in range(4)] == [6, 6, 6, 2]
    assert [row["user_id"] for row in read(tmp_path / "o")] == ["ann", "bob"] * 10


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    run, out = loaded(), tmp_path / "o"
    out.write_text("old")
    monkeypatch.setattr(batch, "USERS", 1)
    monkeypatch.setattr(batch, "ROW_GROUP", 1)
    score = run.model.scores
    diverged = {2: float("nan")}  # bob's history has 2 tokens
    run.model.scores = lambda rows, span: score(rows, span) * diverged.get(int(rows.offsets[-1]), 1.0)
    with pytest.raises(UserError, match="scores are not numbers"):  # after ann's row group was written
        recommend_all(run, find_users(run, "all"), out, k=6, include_seen=True)
    assert out.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["o"]
    with pytest.raises(UserError, match="cannot be written"):
        recommend_all(loaded(), np.array([0]), tmp_path / "absent" / "o", k=1)


def test_users_come_from_a_file_or_a_list_and_unknown_ones_are_counted(tmp_path):
    run = loaded()
    (tmp_path / "users.txt").write_text("bob\n\nann\n")
    assert find_users(run, str(tmp_path / "users.txt")).tolist() == [1, 0]
    for wanted, words in (
        ("ann,carl,dora", "2 of 3 users are not in the log, the first is 'carl'"),
        (str(tmp_path / "absent.txt"), "absent.txt does not exist"),
        (" , ", "names no user"),
    ):
        with pytest.raises(UserError, match=words):
            find_users(run, wanted)


def test_the_whole_history_holds_the_held_out_events_alone_and_in_a_file(tmp_path):
    run = loaded(mask_seen=True)
    before, whole = (recommend(run, user="ann", k=6, whole=flag) for flag in (False, True))
    assert len(whole.history) == run.store.lengths[0] > len(before.history)
    assert before.held_out is not None and whole.held_out is None
    assert before.held_out.item not in {row.item for row in whole.rows}  # it has been seen now
    recommend_all(run, np.array([0]), tmp_path / "o", k=6, whole=True)
    assert read(tmp_path / "o")[0]["items"] == [row.item_id for row in whole.rows]
