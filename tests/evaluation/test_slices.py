"""Slices of the targets against hand-made logs; disjoint and whole on random ones."""

from __future__ import annotations

import numpy as np

from gr.data.split import LeaveOneOutConfig, PaperConfig, make_split
from gr.evaluation.slices import GROUPS, make_slices


def members(slices, group):
    return {one.name: np.flatnonzero(one.rows).tolist() for one in slices if one.group == group}


def test_a_hand_made_log_falls_into_the_slices_that_one_expects(make_store):
    # The last event of each user is held out; training counts are then 6, 2, 1 and 0 of 9.
    store = make_store([[0, 0, 1, 0], [0, 1, 1], [0, 0, 2, 2], [0, 3]], 4)
    split = make_split(PaperConfig(), store)
    slices = make_slices(store, split, split.test.user, split.test.position)
    # Item 0 covers the first half; item 1 begins at 6/9 (torso), item 2 at 8/9 (tail).
    assert members(slices, "popularity") == {
        "head items": [0],
        "torso items": [1],
        "tail items": [2],
        "new items": [3],
    }
    assert members(slices, "repeat") == {"seen before": [0, 1, 2], "not seen before": [3]}
    assert members(slices, "history") == {
        "history 1": [3],
        "history 2": [1],
        "history 3": [0, 2],
    }


def test_items_of_equal_count_share_a_slice(make_store):
    store = make_store([[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 1]], 4)
    split = make_split(PaperConfig(), store)
    names = {one.name for one in make_slices(store, split, split.test.user, split.test.position)}
    assert {"head items", "new items"} <= names and "tail items" not in names


def test_each_group_holds_every_target_once(make_store, random_users):
    store = make_store(random_users(80, 30, longest=20), 30)
    split = make_split(LeaveOneOutConfig(), store)
    slices = make_slices(store, split, split.test.user, split.test.position)
    for group in GROUPS:
        rows = np.stack([one.rows for one in slices if one.group == group])
        np.testing.assert_array_equal(rows.sum(0), 1)
    sizes = [one.rows.sum() for one in slices if one.group == "history"]
    assert len(sizes) == 4 and min(sizes) > 5
