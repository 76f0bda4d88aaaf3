"""Splits hold out what they say, and nothing held out is ever fitted on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from gr import config as configs
from gr.data.layout import LayoutConfig, training_batch
from gr.data.split import (
    SPLITS,
    LeaveOneOutConfig,
    PaperConfig,
    Split,
    TemporalConfig,
    make_split,
    training_counts,
    training_events,
)
from gr.data.store import EventStore, memory_store
from gr.errors import UserError
from random_logs import layouts, split_logs


def log(lengths: list[int], times: bool = True) -> EventStore:
    items = [np.arange(n) for n in lengths]
    return memory_store(items, [10 * np.arange(n) for n in lengths] if times else None)


def pairs(targets) -> list[tuple[int, int]]:
    return list(zip(targets.user.tolist(), targets.position.tolist(), strict=True))


def test_leave_one_out_takes_the_last_two() -> None:
    split = make_split(LeaveOneOutConfig(), log([1, 2, 3, 5]))
    assert split.train_stop.tolist() == [1, 2, 1, 3]
    assert pairs(split.valid) == [(2, 1), (3, 3)]
    assert pairs(split.test) == [(2, 2), (3, 4)]


def test_leave_one_out_trains_whole_on_users_too_short_for_it() -> None:
    split = make_split(LeaveOneOutConfig(min_train_events=3), log([4, 5]))
    assert split.train_stop.tolist() == [4, 3]
    assert pairs(split.test) == [(1, 4)]


def test_paper_holds_out_the_last_event_and_has_no_validation() -> None:
    split = make_split(PaperConfig(), log([1, 2, 4]))
    assert split.train_stop.tolist() == [1, 1, 3]
    assert split.valid is None
    assert pairs(split.test) == [(1, 1), (2, 3)]


def test_temporal_takes_each_users_first_event_of_a_period() -> None:
    store = memory_store(
        [np.arange(5), np.arange(2), np.arange(3), np.arange(3)],
        [[0, 5, 10, 15, 20], [12, 13], [1, 2, 25], [3, 4, 11]],
    )
    split = make_split(TemporalConfig(valid_time=10, test_time=20), store)
    assert split.train_stop.tolist() == [2, 0, 2, 2]
    assert pairs(split.valid) == [(0, 2), (3, 2)]  # user 1 has no history before the period
    assert pairs(split.test) == [(0, 4), (2, 2)]


def test_temporal_fractions_are_shares_of_all_events() -> None:
    store = memory_store([np.arange(100)] * 2, [np.arange(100), np.arange(100)])
    split = make_split(TemporalConfig(valid_fraction=0.2, test_fraction=0.1), store)
    assert split.train_stop.tolist() == [70, 70]
    assert pairs(split.test) == [(0, 90), (1, 90)]


@settings(max_examples=80, deadline=None)
@given(split_logs())
def test_targets_come_after_training_and_validation_before_test(case: tuple[EventStore, Split]) -> None:
    store, split = case
    assert (split.train_stop >= 0).all() and (split.train_stop <= store.lengths).all()
    for targets in (split.valid, split.test):
        if targets is not None:
            assert (targets.position >= np.maximum(split.train_stop[targets.user], 1)).all()
            assert (targets.position < store.lengths[targets.user]).all()
            assert (np.diff(targets.user) > 0).all()
    if split.valid is not None:
        valid = dict(pairs(split.valid))
        assert all(valid.get(user, -1) < position for user, position in pairs(split.test))
        # Histories at validation hold training events only.
        assert (split.valid.position == split.train_stop[split.valid.user]).all()


@settings(max_examples=80, deadline=None)
@given(split_logs(), layouts)
def test_training_batches_never_hold_a_held_out_event(case: tuple[EventStore, Split], layout: LayoutConfig) -> None:
    store, split = case
    batch = training_batch(store, split, layout, np.flatnonzero(split.train_stop >= 2))
    row = np.repeat(np.arange(batch.num_sequences), np.diff(batch.offsets))
    user = batch.rows["sample_key"].numpy()[row]
    event = batch.index["event"].numpy()
    labelled = batch.labels.position.numpy()
    used = {*zip(user.tolist(), event.tolist(), strict=True)}
    used |= {*zip(user[labelled].tolist(), (event[labelled] + 1).tolist(), strict=True)}
    for targets in (split.valid, split.test):
        assert targets is None or not used & {*pairs(targets)}
    assert all(event < split.train_stop[user] for user, event in used)
    # No time of a held-out event either.
    last = store.columns["timestamp"][store.offsets[user] + split.train_stop[user] - 1]
    assert (batch.tokens["query_time"].numpy() <= last).all()


@settings(max_examples=50, deadline=None)
@given(split_logs())
def test_training_counts_see_training_events_only(case: tuple[EventStore, Split]) -> None:
    store, split = case
    slow = np.zeros(store.num_items, int)
    for user in range(store.num_users):
        for event in range(split.train_stop[user]):
            slow[store.columns["item_id"][store.offsets[user] + event]] += 1
    assert training_counts(store, split).tolist() == slow.tolist()
    assert training_events(store, split).sum() == slow.sum()


def test_a_temporal_split_of_a_log_without_times_is_refused() -> None:
    with pytest.raises(UserError, match="temporal split needs times"):
        make_split(TemporalConfig(), log([5, 5], times=False))


@pytest.mark.parametrize(
    ("config", "lengths", "reason"),
    [
        (LeaveOneOutConfig(), [2, 2], "no user with enough events"),
        (PaperConfig(), [2, 2], "no user with 2 training events"),
        (TemporalConfig(valid_time=1000, test_time=2000), [5], "no user with enough events"),
        (TemporalConfig(valid_time=31, test_time=39), [5], "no|finds no validation target"),
    ],
)
def test_a_split_that_leaves_nothing_is_refused(config: object, lengths: list[int], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_split(config, log(lengths))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "leave_one_out", "min_train_events": 0},
        {"kind": "temporal", "valid_time": 5},
        {"kind": "temporal", "valid_time": 5, "test_time": 4},
        {"kind": "temporal", "valid_fraction": 0.5, "test_fraction": 0.5},
    ],
)
def test_an_impossible_config_is_refused(fields: dict) -> None:
    with pytest.raises(UserError):
        configs.from_dict(SPLITS[fields["kind"]][0], fields)
