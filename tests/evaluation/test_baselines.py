"""Each baseline against a slow loop over a small log, and what they may read."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from gr import config as configs
from gr.data.layout import LayoutConfig, evaluation_batch
from gr.data.split import LeaveOneOutConfig, make_split, training_counts
from gr.errors import UserError
from gr.evaluation.baselines import (
    BASELINES,
    GRIDS,
    LABELS,
    ItemKNNConfig,
    MarkovConfig,
    PopularityConfig,
    RepeatLastConfig,
    TrainingStatistics,
    fit,
    setting,
)

V = 13
LAYOUT = LayoutConfig(max_events=4)
EVERY = [
    PopularityConfig(),
    RepeatLastConfig(),
    MarkovConfig(backoff=2.5),
    ItemKNNConfig(window=3, history=2),
    ItemKNNConfig(
        window=2,
        decay=0.5,
        direction="both",
        distance="inverse",
        popularity_exponent=0.5,
        source_exponent=0.5,
    ),
]


@pytest.fixture
def world(make_store, random_users):
    store = make_store(random_users(19, V, shortest=4), V, actions=True)
    return store, make_split(LeaveOneOutConfig(), store)


def training_lists(store, split) -> list[list[int]]:
    item = store.columns["item_id"]
    return [item[lo : lo + n].tolist() for lo, n in zip(store.offsets[:-1], split.train_stop, strict=True)]


def history_lists(store, targets) -> list[list[int]]:
    item, lists = store.columns["item_id"], []
    for user, position in zip(targets.user, targets.position, strict=True):
        start = store.offsets[user]
        lists.append(item[start + max(0, position - LAYOUT.max_events) : start + position].tolist())
    return lists


def slow_item_knn(config: ItemKNNConfig, lists, counts) -> np.ndarray:
    similarity = np.zeros((V, V))
    for items in lists:
        for p, i in enumerate(items):
            for q, j in enumerate(items):
                d = q - p
                if config.direction == "both":
                    d = abs(d)
                if 1 <= d <= config.window:
                    similarity[i, j] += config.decay ** (d - 1) if config.distance == "power" else 1 / d
    for i in range(V):
        for j in range(V):
            similarity[i, j] *= (
                max(counts[i], 1) ** -config.source_exponent * max(counts[j], 1) ** -config.popularity_exponent
            )
    return similarity


def slow_score(config, lists, history: list[int], j: int) -> float:
    """The score's definition; for ItemKNN only the neighbours' part."""
    counts = Counter(item for items in lists for item in items)
    match config.kind:
        case "popularity":
            return counts[j]
        case "markov":
            follow = Counter(pair for items in lists for pair in zip(items, items[1:], strict=False))
            out = sum(n for (i, _), n in follow.items() if i == history[-1])
            p = counts[j] / sum(counts.values())
            return (follow[history[-1], j] + config.backoff * p) / (out + config.backoff)
        case "item_knn":
            similarity = slow_item_knn(config, lists, counts)
            recent = history[::-1][: config.history]
            return sum(config.decay**back * similarity[i, j] for back, i in enumerate(recent))
    raise AssertionError(config.kind)


@pytest.mark.parametrize("config", [c for c in EVERY if c.kind != "repeat_last"], ids=setting)
def test_scores_equal_the_slow_definition(world, config):
    store, split = world
    scores = fit(config, store, split).scores(evaluation_batch(store, split.test, slice(None), LAYOUT), (0, V)).numpy()
    lists = training_lists(store, split)
    expected = np.array([[slow_score(config, lists, h, j) for j in range(V)] for h in history_lists(store, split.test)])
    if config.kind == "item_knn":
        scores, rest = np.maximum(scores, 0), scores[expected == 0]
        assert (rest < 0).all()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_repeat_last_orders_distinct_history_items_by_recency_then_the_rest_by_popularity(world):
    store, split = world
    batch = evaluation_batch(store, split.test, slice(None), LAYOUT)
    ranked = fit(RepeatLastConfig(), store, split).recommend(batch, V)
    counts = training_counts(store, split)
    for history, items in zip(history_lists(store, split.test), ranked.items.tolist(), strict=True):
        distinct = list(dict.fromkeys(history[::-1]))
        assert items[: len(distinct)] == distinct
        rest = [counts[j] for j in items[len(distinct) :]]
        assert rest == sorted(rest, reverse=True)


def test_item_knn_orders_items_without_neighbours_by_popularity(make_store):
    store = make_store([[0, 1, 0, 0], [2, 3, 0, 0], [2, 3, 0, 0], [4, 4, 0, 0]], 6)
    split = make_split(LeaveOneOutConfig(), store)
    batch = evaluation_batch(store, split.valid, np.array([0]), LAYOUT)  # history 0, 1: nothing followed 1
    ranked = fit(ItemKNNConfig(window=1, history=1, popularity_exponent=0.0), store, split).recommend(batch, 6)
    assert ranked.items.tolist() == [[2, 3, 4, 0, 1, 5]]


@pytest.mark.parametrize("config", EVERY, ids=setting)
def test_blocks_of_items_give_the_scores_of_the_whole(world, config):
    store, split = world
    batch = evaluation_batch(store, split.test, slice(None), LAYOUT)
    model = fit(config, store, split)
    whole = model.scores(batch, (0, V))
    assert whole.is_floating_point() and whole.shape == (len(split.test), V)
    parts = [model.scores(batch, span) for span in ((0, 5), (5, 6), (6, V))]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("config", EVERY, ids=setting)
def test_action_tokens_change_nothing(world, config):
    store, split = world
    model = fit(config, store, split)
    plain = evaluation_batch(store, split.test, slice(None), LAYOUT)
    mixed = evaluation_batch(store, split.test, slice(None), LayoutConfig("interleaved", LAYOUT.max_events))
    assert mixed.num_tokens == 2 * plain.num_tokens
    assert torch.equal(model.scores(plain, (0, V)), model.scores(mixed, (0, V)))


@pytest.mark.parametrize("config", EVERY, ids=setting)
def test_held_out_events_are_not_counted(world, config):
    store, split = world
    item = store.columns["item_id"].copy()
    for targets in (split.valid, split.test):
        at = store.offsets[targets.user] + targets.position
        item[at] = (item[at] + 1) % V
    other = dataclasses.replace(store, columns=store.columns | {"item_id": item})
    batch = evaluation_batch(store, split.test, slice(None), LAYOUT)
    assert torch.equal(fit(config, store, split).scores(batch, (0, V)), fit(config, other, split).scores(batch, (0, V)))


def test_sparse_and_dense_similarity_agree(world, monkeypatch):
    store, split = world
    batch = evaluation_batch(store, split.test, slice(None), LAYOUT)
    scores = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("gr.evaluation.baselines.item_knn.DENSE_SHARE", share)
        model = fit(ItemKNNConfig(), store, split)
        assert isinstance(model.similarity, np.ndarray) == (share == 0.0)
        scores.append(model.scores(batch, (0, V)))
    torch.testing.assert_close(*scores)


def test_counts_are_those_of_the_split(world):
    store, split = world
    np.testing.assert_array_equal(TrainingStatistics(store, split).counts, training_counts(store, split))


def test_recommend_leaves_out_what_is_excluded_and_marks_what_is_lacking(world):
    store, split = world
    batch = evaluation_batch(store, split.test, slice(0, 2), LAYOUT)
    exclude = torch.ones(2, V, dtype=torch.bool)
    exclude[0, [3, 5]] = False
    ranked = fit(PopularityConfig(), store, split).recommend(batch, 3, exclude)
    assert sorted(ranked.items[0, :2].tolist()) == [3, 5] and ranked.items[0, 2] == -1
    assert ranked.items[1].tolist() == [-1, -1, -1] and (ranked.scores[1] == -torch.inf).all()
    assert fit(PopularityConfig(), store, split).recommend(batch, V + 2).items[:, V:].eq(-1).all()


def test_every_registered_baseline_builds_from_plain_data(world):
    store, split = world
    assert BASELINES.keys() == GRIDS.keys() == LABELS.keys()
    for kind, (config, _) in BASELINES.items():
        model = fit(configs.from_dict(config, {"kind": kind}), store, split)
        assert model.num_items == V
        assert 1 <= len(GRIDS[kind]) <= 24 and len(set(GRIDS[kind])) == len(GRIDS[kind])


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (ItemKNNConfig, {"window": 0}),
        (ItemKNNConfig, {"history": 0}),
        (ItemKNNConfig, {"decay": 1.5}),
        (MarkovConfig, {"backoff": 0.0}),
    ],
)
def test_impossible_settings_are_refused(config, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        config(**fields)
