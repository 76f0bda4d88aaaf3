"""Layouts equal a slow loop over users, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data.batch import JaggedBatch
from gr.data.layout import LayoutConfig, evaluation_batch, history_batch, training_batch, training_labels
from gr.data.split import LeaveOneOutConfig, Split, make_split
from gr.data.store import EventStore, memory_store
from gr.errors import UserError
from gr.kernels.hstu_attention.time_buckets import NARROW
from random_logs import layouts, split_logs


def slow_row(store: EventStore, user: int, start: int, stop: int, layout: LayoutConfig) -> list[dict[str, int]]:
    """The tokens of events [start, stop) of a user, spelled out."""
    events = [
        {name: int(values[store.offsets[user] + e]) for name, values in store.columns.items()}
        for e in range(store.lengths[user])
    ]
    tokens = []
    for place, e in enumerate(range(start, stop)):
        common = {
            "item_id": events[e]["item_id"],
            "timestamp": events[e]["timestamp"],
            "item_index": place,
            "event": e,
            "segment": 0,
        }
        if layout.kind != "items":
            common["action"] = events[e]["action"]
        next_time = events[e + 1]["timestamp"]
        if layout.kind == "interleaved":
            tokens.append({**common, "token_type": 0, "query_time": events[e]["timestamp"]})
            tokens.append({**common, "token_type": 1, "query_time": next_time, "next": events[e + 1]["item_id"]})
        else:
            tokens.append({**common, "token_type": 0, "query_time": next_time, "next": events[e + 1]["item_id"]})
    return tokens


def check(batch: JaggedBatch, rows: list[list[dict[str, int]]], users: list[int]) -> None:
    flat = [token for row in rows for token in row]
    assert batch.offsets.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert batch.max_seq_len == max(map(len, rows)) and batch.num_tokens == len(flat)
    assert batch.rows["sample_key"].tolist() == users
    columns = {**batch.tokens, **batch.index}
    assert set(columns) == set(flat[0]) - {"next"} | {"token_type"}
    times = ("timestamp", "query_time")
    narrow = all(0 <= token[name] < 2**31 - 1 for token in flat for name in times)
    for name, values in columns.items():
        assert values.dtype == (torch.int32 if narrow and name in times else torch.int64)
        assert values.tolist() == [token[name] for token in flat], name


@settings(max_examples=80, deadline=None)
@given(split_logs(), layouts, st.randoms(use_true_random=False))
def test_training_rows_equal_the_slow_loop(case: tuple[EventStore, Split], layout: LayoutConfig, random) -> None:
    store, split = case
    users = np.flatnonzero(split.train_stop >= 2).tolist()
    random.shuffle(users)
    batch = training_batch(store, split, layout, np.array(users))
    stops = [int(split.train_stop[u]) - 1 for u in users]
    rows = [
        slow_row(store, u, max(0, stop - layout.max_events), stop, layout) for u, stop in zip(users, stops, strict=True)
    ]
    check(batch, rows, users)
    flat = [token for row in rows for token in row]
    labelled = [i for i, token in enumerate(flat) if "next" in token]
    assert batch.labels.position.tolist() == labelled
    assert batch.labels.item_id.tolist() == [flat[i]["next"] for i in labelled]
    assert batch.labels.weight.tolist() == [1.0] * len(labelled)
    assert training_labels(store, split, layout, np.array(users)).tolist() == batch.labels.item_id.tolist()


@settings(max_examples=80, deadline=None)
@given(split_logs(), layouts)
def test_evaluation_rows_equal_the_slow_loop(case: tuple[EventStore, Split], layout: LayoutConfig) -> None:
    store, split = case
    for targets in (split.valid, split.test):
        if targets is None:
            continue
        rows = [
            slow_row(store, u, max(0, p - layout.max_events), p, layout)
            for u, p in zip(targets.user.tolist(), targets.position.tolist(), strict=True)
        ]
        batch = evaluation_batch(store, targets, slice(None), layout)
        check(batch, rows, targets.user.tolist())
        assert batch.labels.position.tolist() == batch.last_positions().tolist()
        assert batch.labels.item_id.tolist() == [row[-1]["next"] for row in rows]
        assert "num_targets" not in batch.rows
        picked = np.array([len(targets) - 1, 0])
        some = evaluation_batch(store, targets, picked, layout)
        check(some, [rows[i] for i in picked], targets.user[picked].tolist())


@settings(max_examples=80, deadline=None)
@given(split_logs(), layouts)
def test_a_history_from_outside_equals_the_one_from_the_store(
    case: tuple[EventStore, Split], layout: LayoutConfig
) -> None:
    store, split = case
    wanted = evaluation_batch(store, split.test, slice(None), layout)

    def rows(name: str) -> list[np.ndarray]:
        starts = store.offsets[split.test.user]
        return [store.columns[name][s : s + p] for s, p in zip(starts, split.test.position, strict=True)]

    asked = store.columns["timestamp"][store.offsets[split.test.user] + split.test.position]
    batch = history_batch(rows("item_id"), rows("timestamp"), rows("action"), asked, layout)
    assert batch.labels is None
    torch.testing.assert_close(batch.offsets, wanted.offsets)
    for name, values in wanted.tokens.items():
        torch.testing.assert_close(batch.tokens[name], values)
    for name in ("item_index", "token_type", "segment"):
        torch.testing.assert_close(batch.index[name], wanted.index[name])


@pytest.mark.parametrize(
    ("first", "last", "dtype"),
    [(0, NARROW - 1, torch.int32), (0, NARROW, torch.int64), (-1, 5, torch.int64), (-(2**40), 2**40, torch.int64)],
)
def test_times_have_32_bits_where_no_distance_of_two_needs_more(first, last, dtype) -> None:
    store = memory_store([np.arange(5)], [np.array([first, 1, 2, last, last])])
    batch = training_batch(store, make_split(LeaveOneOutConfig(), store), LayoutConfig(), np.array([0]))
    history = history_batch([np.arange(2)], [np.array([first, 2])], None, last, LayoutConfig())
    for each, query in ((batch, [1, 2]), (history, [2, last])):
        assert each.tokens["timestamp"].dtype == each.tokens["query_time"].dtype
        assert each.tokens["timestamp"].tolist()[0] == first and each.tokens["query_time"].tolist() == query
    assert history.tokens["timestamp"].dtype == dtype


def test_a_log_without_times_gives_no_time_columns() -> None:
    store = memory_store([np.arange(5)])
    split = make_split(LeaveOneOutConfig(), store)
    batch = training_batch(store, split, LayoutConfig(), np.array([0]))
    assert set(batch.tokens) == {"item_id"}


@pytest.mark.parametrize("kind", ["interleaved", "added"])
def test_a_layout_with_actions_refuses_a_log_without(kind: str) -> None:
    store = memory_store([np.arange(5)])
    with pytest.raises(UserError, match="reads actions.*layout 'items'"):
        training_batch(store, make_split(LeaveOneOutConfig(), store), LayoutConfig(kind), np.array([0]))
    with pytest.raises(UserError, match="reads actions"):
        history_batch([np.array([1])], None, None, None, LayoutConfig(kind))


@pytest.mark.parametrize(
    ("items", "times", "asked", "reason"),
    [
        ([[]], None, None, "a history is empty"),
        ([], None, None, "a history is empty"),
        ([[1]], [[5]], None, "needs query_time"),
        ([[1, 2]], [[5]], 6, "timestamp column has other lengths"),
    ],
)
def test_a_wrong_history_is_refused(items: list, times: list | None, asked: int | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        history_batch(items, times, None, asked, LayoutConfig())


def test_max_events_must_be_positive() -> None:
    with pytest.raises(UserError, match="max_events is 0"):
        LayoutConfig(max_events=0)


def test_a_batch_moves_whole() -> None:
    store = memory_store([np.arange(5), np.arange(4)], [np.arange(5), np.arange(4)])
    batch = training_batch(store, make_split(LeaveOneOutConfig(), store), LayoutConfig(), np.array([0, 1]))
    batch = batch.replace(views={"again": batch})
    moved = batch.to("meta")
    for part in (moved, moved.views["again"]):
        tensors = [part.offsets, part.labels.position, part.labels.item_id, part.labels.weight]
        tensors += [*part.tokens.values(), *part.rows.values(), *part.index.values()]
        assert all(t.device.type == "meta" for t in tensors)
    assert (moved.num_tokens, moved.max_seq_len, moved.num_sequences) == (3, 2, 2)
    assert all(v.shape == (3,) for v in {**moved.tokens, **moved.index}.values())
