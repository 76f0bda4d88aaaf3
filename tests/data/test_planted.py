"""The planted world and its ceiling, against brute force that uses the law's definition only."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from gr.data.ceiling import ceiling, expected_metrics, ideal_scores, mean_continue, predictive
from gr.data.planted import EPOCH_START, Planted, PlantedConfig, generate, item_titles, make_law
from gr.data.split import Targets
from gr.data.store import memory_store, read_store
from gr.errors import UserError
from gr.evaluation.ranking import seen_pairs

TINY = PlantedConfig(
    seed=3,
    num_users=40,
    num_items=4,
    num_topics=2,
    subtopics=1,
    num_interests=2,
    favourites=1,
    min_events=4,
    max_events=4,
)
VARIANTS = {
    "plain": TINY,
    "actions": dataclasses.replace(TINY, actions=True),
    "urn": dataclasses.replace(TINY, rich_get_richer=0.7),
    "arrival": dataclasses.replace(TINY, item_arrival=True),
    "all": dataclasses.replace(TINY, actions=True, rich_get_richer=0.7, item_arrival=True),
}


def joint_probability(law, items, times, actions, z, modes):
    """P(z, modes, items, actions | times), straight from the law's numbered rules; modes[t] True = continued."""
    cfg = law.config
    probability = law.interest_prior[z]
    leaves = []
    for t, item in enumerate(items):
        leaf = item % cfg.num_leaves
        visits = [leaves.count(i) for i in range(cfg.num_leaves)]
        own = (law.interest[z, leaf] + cfg.rich_get_richer * visits[leaf]) / (1 + cfg.rich_get_richer * len(leaves))
        if t == 0:
            probability *= own if not modes[0] else 0.0
        else:
            c = np.exp(-(times[t] - times[t - 1]) / cfg.memory)
            if modes[t]:
                last, before = leaves[-1], leaves[-2] if t > 1 else leaves[-1]
                topic, sub = divmod(leaf, cfg.subtopics)
                follow = law.topic_next[before // cfg.subtopics, last // cfg.subtopics, topic]
                probability *= c * follow * law.sub_next[topic, last % cfg.subtopics, sub]
            else:
                probability *= (1 - c) * own
        there = [i for i in range(cfg.num_items) if i % cfg.num_leaves == leaf and law.arrival[i] <= times[t]]
        probability *= law.weight[item] / law.weight[there].sum() if item in there else 0.0
        if actions is not None and t < len(actions):
            like = law.like[z, leaf]
            probability *= like if actions[t] else 1 - like
        leaves.append(leaf)
    return probability


def brute_force(law, items, times, actions, query_time):
    """Next-item distribution by summing the joint over every interest and every pattern of modes."""
    cfg = law.config
    weights = np.zeros(cfg.num_items)
    times = [*times, query_time]
    for item in range(cfg.num_items):
        for z in range(cfg.num_interests):
            for modes in itertools.product([False, True], repeat=len(times)):
                weights[item] += joint_probability(law, [*items, item], times, actions, z, modes)
    return weights / weights.sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ceiling_equals_brute_force_over_every_history_of_a_world_of_4_items_and_length_4(variant):
    cfg = VARIANTS[variant]
    law = make_law(cfg)
    times = EPOCH_START + np.array(
        [100, 9_000_000, 9_004_000, 9_009_000]
    )  # long and short gaps; some items are still to come
    assert len({tuple(row) for row in law.interest.tolist()}) == 2, "interests must differ for the filter to matter"
    histories, patterns = [], []
    for items in itertools.product(range(4), repeat=3):
        if all(law.arrival[i] <= t for i, t in zip(items, times, strict=False)):
            for likes in itertools.product([0, 1], repeat=3) if cfg.actions else [None]:
                histories.append(items)
                patterns.append(likes)
    step = max(1, len(histories) // 64)  # all of them, or an even sample where actions multiply them by 8
    histories, patterns = histories[::step], patterns[::step]
    n = len(histories)
    offsets = np.arange(n + 1) * 3
    flat = np.array(histories).reshape(-1)
    clock = np.tile(times[:3], n)
    actions = np.array(patterns).reshape(-1) if cfg.actions else None
    query = np.full(n, times[3])
    got = predictive(law, offsets, flat, clock, actions, query)
    want = np.stack([brute_force(law, h, times[:3], p, times[3]) for h, p in zip(histories, patterns, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)

    users = [np.append(h, 0) for h in histories]  # the target itself (here item 0) is never read
    likes = [np.append(p, 0) for p in patterns] if cfg.actions else None
    store = memory_store(users, [times] * n, likes, num_items=4)
    best = ceiling(store, cfg, Targets(np.arange(n), np.full(n, 3)), (1, 2, 3))
    for k in (1, 2, 3):  # the ceiling is what the best of all 24 rankings of the 4 items reaches for each history
        orders = list(itertools.permutations(range(4)))
        hits = [max(sum(w[list(o[:k])]) for o in orders) for w in want]
        gains = [max(sum(w[o[r]] / np.log2(r + 2) for r in range(k)) for o in orders) for w in want]
        assert best[f"hr@{k}"] == pytest.approx(np.mean(hits), rel=1e-10)
        assert best[f"ndcg@{k}"] == pytest.approx(np.mean(gains), rel=1e-10)


def test_expected_metrics_equal_the_mean_over_targets_drawn_from_the_posterior():
    p = np.array([[0.1, 0.6, 0.05, 0.25]])
    got = expected_metrics(p, (1, 2))
    ranks = {1: 1, 3: 2, 0: 3, 2: 4}
    assert got["hr@2"][0] == pytest.approx(sum(p[0, i] for i, r in ranks.items() if r <= 2))
    assert got["ndcg@2"][0] == pytest.approx(sum(p[0, i] / np.log2(r + 1) for i, r in ranks.items() if r <= 2))
    assert got["mrr"][0] == pytest.approx(sum(p[0, i] / r for i, r in ranks.items()))


def _prepared(cfg, tmp_path):
    Planted(cfg).prepare(tmp_path / "world")
    store = read_store(tmp_path / "world")
    return store, Targets(np.arange(store.num_users), store.lengths - 1)


def test_the_oracle_hits_as_often_as_the_ceiling_says(tmp_path):
    cfg = PlantedConfig(num_users=3000, num_items=200, num_topics=4, subtopics=2)
    store, targets = _prepared(cfg, tmp_path)
    items, times = store.columns["item_id"], store.columns["timestamp"]
    last = store.offsets[1:] - 1
    history = np.ones(store.num_events, dtype=bool)
    history[last] = False
    offsets = store.offsets - np.arange(store.num_users + 1)
    p = predictive(make_law(cfg), offsets, items[history], times[history], None, times[last])
    own = p[np.arange(len(last)), items[last]]
    hit = (p > own[:, None]).sum(1) < 10
    losses, better = ideal_scores(store, cfg, targets)
    assert np.array_equal(better < 10, hit) and np.allclose(losses, -np.log(own))
    expected = ceiling(store, cfg, targets, (10,))["hr@10"]
    assert abs(hit.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(last))
    # The same where seen items are not shown: nobody hits a target that was seen before.
    p[seen_pairs(store, targets.user, targets.position)] = -1.0
    target = p[np.arange(len(last)), items[last]][:, None]
    hit = ((p > target).sum(1) < 10) & (target[:, 0] >= 0)
    expected = ceiling(store, cfg, targets, (10,), mask_seen=True)["hr@10"]
    assert abs(hit.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(last))
    # A window as long as the longest history masks all of it, one of 3 events less.
    longest = int(store.lengths.max())
    assert ceiling(store, cfg, targets, (10,), mask_seen=True, window=longest)["hr@10"] == expected
    windowed = ceiling(store, cfg, targets, (10,), mask_seen=True, window=3)["hr@10"]
    p = predictive(make_law(cfg), offsets, items[history], times[history], None, times[last])
    p[seen_pairs(store, targets.user, targets.position, 3)] = -1.0
    target = p[np.arange(len(last)), items[last]][:, None]
    hit = ((p > target).sum(1) < 10) & (target[:, 0] >= 0)
    assert abs(hit.mean() - windowed) < 4 * np.sqrt(windowed * (1 - windowed) / len(last))


def test_times_carry_information_and_the_blind_ranker_is_the_best_without_them(tmp_path):
    cfg = PlantedConfig(num_users=1500)
    store, targets = _prepared(cfg, tmp_path)
    seeing = ceiling(store, cfg, targets, (10,))["hr@10"]
    blind = ceiling(store, cfg, targets, (10,), see_times=False)["hr@10"]
    assert seeing > blind + 0.05
    assert 0.3 < mean_continue(make_law(cfg)) < 0.7


def test_one_of_the_two_last_topics_alone_says_almost_nothing_about_the_next():
    law = make_law(PlantedConfig())
    a = law.config.num_topics
    np.testing.assert_allclose(law.topic_next.mean(0), 1 / a, atol=1e-12)
    np.testing.assert_allclose(law.topic_next.mean(1), 1 / a, atol=1e-12)
    assert law.topic_next.max(2).min() > 0.9


def test_users_do_not_depend_on_the_size_of_the_world():
    small, large = (list(generate(PlantedConfig(num_users=n))) for n in (300, 2500))
    n = int(small[0].offsets[-1])
    assert len(large) == 3 and large[2].offsets.size == 2500 - 2048 + 1
    np.testing.assert_array_equal(small[0].item_id, large[0].item_id[:n])
    np.testing.assert_array_equal(small[0].timestamp, large[0].timestamp[:n])


def test_the_default_world_is_this_one():
    """Numbers of one world are comparable only while its stream stays what it is."""
    first = next(generate(PlantedConfig(num_users=8)))
    assert first.item_id[:6].tolist() == FIRST_ITEMS and int(first.timestamp[0]) == FIRST_TIME


FIRST_ITEMS = [568, 308, 36, 22, 94, 280]
FIRST_TIME = 1620880124


def test_items_arrive_and_are_not_seen_before():
    cfg = PlantedConfig(num_users=500, item_arrival=True, actions=True)
    law, users = make_law(cfg), next(generate(cfg))
    assert (law.arrival[users.item_id] <= users.timestamp).all()
    assert set(np.unique(users.action)) == {0, 1}


def test_the_urn_makes_users_repeat_their_leaves():
    def repeats(g):
        users = next(generate(PlantedConfig(num_users=400, rich_get_richer=g, memory=1.0)))
        leaf = users.item_id % PlantedConfig().num_leaves
        return np.mean([len(set(leaf[a:b])) for a, b in zip(users.offsets[:-1], users.offsets[1:], strict=True)])

    assert repeats(2.0) < repeats(0.0) - 0.3


def test_titles_are_unique_and_impossible_worlds_are_refused():
    assert len(set(item_titles(PlantedConfig()))) == PlantedConfig().num_items
    pairs = {"min_events": 9, "max_events": 8}
    for bad in (
        pairs,
        {"num_items": 3},
        {"blur": 0.0},
        {"favourites": 99},
        {"num_users": 0},
        {"rich_get_richer": -1.0},
    ):
        with pytest.raises(UserError, match="planted world"):
            PlantedConfig(**bad)
