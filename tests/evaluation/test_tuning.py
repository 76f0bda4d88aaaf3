"""Tuning: chooses on validation alone, and says on what it chose."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gr.data.layout import LayoutConfig
from gr.data.loader import EvalLoader
from gr.data.split import LeaveOneOutConfig, PaperConfig, make_split
from gr.errors import UserError
from gr.evaluation.baselines import GRIDS, MarkovConfig, fit
from gr.evaluation.metrics import means
from gr.evaluation.ranking import rank_targets
from gr.evaluation.tuning import tune, tune_all

V = 13
LAYOUT = LayoutConfig(max_events=4)


@pytest.fixture
def world(make_store, random_users):
    store = make_store(random_users(40, V, shortest=4), V)
    return store, make_split(LeaveOneOutConfig(), store)


@pytest.mark.parametrize("mask_seen", [False, True])
def test_the_best_validation_setting_is_chosen(world, mask_seen):
    store, split = world
    tuned = tune("item_knn", store, split, LAYOUT, mask_seen)
    loader = EvalLoader(store, split.valid, LAYOUT)
    values = [means(rank_targets(fit(c, store, split), loader, mask_seen))["ndcg@10"] for c in GRIDS["item_knn"]]
    np.testing.assert_allclose([row["ndcg@10"] for row in tuned.rows], values, rtol=1e-9)
    assert tuned.config == GRIDS["item_knn"][int(np.argmax(values))]
    assert [row["chosen"] for row in tuned.rows].index(True) == int(np.argmax(values))
    assert all(row["users"] == len(split.valid) for row in tuned.rows)


def test_test_targets_do_not_influence_the_choice(world):
    store, split = world
    item = store.columns["item_id"].copy()
    at = store.offsets[split.test.user] + split.test.position
    item[at] = (item[at] + 1) % V
    other = dataclasses.replace(store, columns=store.columns | {"item_id": item})
    for kind, tuned in tune_all(store, split, LAYOUT, False).items():
        assert tune(kind, other, split, LAYOUT, False).rows == tuned.rows


def test_a_draw_of_users_is_stated_and_fixed_by_its_seed(world):
    store, split = world
    tuned = tune("markov", store, split, LAYOUT, False, max_users=15, seed=3)
    assert tuned.rows[0]["users"] == 15
    assert tuned.rows == tune("markov", store, split, LAYOUT, False, max_users=15, seed=3).rows


def test_the_headline_names_the_chosen_setting_and_among_how_many(world):
    store, split = world
    tuned = tune("markov", store, split, LAYOUT, False, grid=[MarkovConfig(backoff=w) for w in (0.5, 5.0, 50.0)])
    assert "best of 3 settings" in tuned.headline() and tuned.headline().endswith(tuned.setting)
    assert [row["setting"] for row in tuned.rows if row["chosen"]] == [tuned.setting]


def test_without_validation_the_default_is_taken_and_said(world):
    store, _ = world
    split = make_split(PaperConfig(), store)
    tuned = tune("item_knn", store, split, LAYOUT, False)
    assert tuned.config == GRIDS["item_knn"][0] and tuned.rows[0]["ndcg@10"] is None
    assert "no validation split" in tuned.headline()


def test_an_unknown_baseline_is_named(world):
    store, split = world
    with pytest.raises(UserError, match="'itemknn' is unknown"):
        tune("itemknn", store, split, LAYOUT, False)
