"""Full-corpus ranking: exact ties, masking, blocks, processes, and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gr.data.layout import LayoutConfig
from gr.data.loader import EvalLoader
from gr.data.split import LeaveOneOutConfig, PaperConfig, make_split
from gr.errors import UserError
from gr.evaluation.metrics import means, per_target, summarise
from gr.evaluation.ranking import rank_targets, seen_mask, seen_pairs
from gr.evaluation.saved_ranks import load_ranks, save_ranks

LAYOUT = LayoutConfig(max_events=3)


class Fixed:
    """Scores that depend on the user alone: a (U, V) table."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.num_items = table, table.shape[1]

    def scores(self, batch, item_range):
        return self.table[batch.rows["sample_key"], item_range[0] : item_range[1]]


@pytest.fixture
def world(make_store, random_users):
    store = make_store(random_users(23, 17), 17)
    return store, make_split(LeaveOneOutConfig(), store)


def coarse_table(users: int, items: int, dtype=torch.float32) -> torch.Tensor:
    """Few distinct values, so that most targets are tied."""
    return torch.randint(0, 4, (users, items), generator=torch.Generator().manual_seed(1)).to(dtype)


def slow_counts(store, targets, table, mask_seen):
    """(better, tied, candidates) by looking at every pair."""
    result = []
    for u, p in zip(targets.user, targets.position, strict=True):
        events = store.columns["item_id"][store.offsets[u] : store.offsets[u + 1]]
        target, seen = events[p], set(events[:p].tolist())
        others = [i for i in range(store.num_items) if i != target and not (mask_seen and i in seen)]
        scores = table[u].tolist()
        better = sum(scores[i] > scores[target] for i in others)
        tied = sum(scores[i] == scores[target] for i in others)
        if mask_seen and target in seen:
            better, tied = len(others), 0  # it would not be shown
        result.append((better, tied, len(others) + 1))
    return np.array(result).T


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("block", [4, 17, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_counts_equal_brute_force_under_ties(world, mask_seen, block, dtype):
    store, split = world
    table = coarse_table(store.num_users, store.num_items, dtype)
    ranks = rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT, 5), mask_seen, block=block)
    better, tied, candidates = slow_counts(store, split.test, table, mask_seen)
    np.testing.assert_array_equal(ranks.better, better)
    np.testing.assert_array_equal(ranks.tied, tied)
    np.testing.assert_array_equal(ranks.candidates, candidates)
    np.testing.assert_array_equal(ranks.rank, better + tied / 2 + 1)


def test_the_three_rules_of_what_was_seen_on_a_hand_made_example(make_store):
    # Target 4 after 0 1 2 3; the layout reads the last 3 events; item 5 was never seen.
    store = make_store([[0, 1, 2, 3, 4], [4, 0, 1, 2, 4]], 6)
    split = make_split(PaperConfig(), store)
    table = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]]).repeat(2, 1)
    loader = EvalLoader(store, split.test, LAYOUT)
    found = {rule: rank_targets(Fixed(table), loader, rule) for rule in (False, True, "window")}
    # User 0: items 0 to 3 score higher. User 1: target 4 stands in the log, before the window of 3.
    assert [found[rule].better.tolist() for rule in (False, True, "window")] == [[4, 4], [0, 2], [1, 1]]
    assert [found[rule].candidates.tolist() for rule in (False, True, "window")] == [[6, 6], [2, 3], [3, 3]]


def test_scores_too_large_to_keep_are_computed_twice_with_the_same_counts(world, monkeypatch):
    store, split = world
    table = coarse_table(store.num_users, store.num_items)
    loader = EvalLoader(store, split.test, LAYOUT, 5)
    kept = rank_targets(Fixed(table), loader, True, block=4)
    monkeypatch.setattr("gr.evaluation.ranking.KEEP_BYTES", 0)
    again = rank_targets(Fixed(table), loader, True, block=4)
    np.testing.assert_array_equal(kept.better, again.better)
    np.testing.assert_array_equal(kept.tied, again.tied)


def test_constant_scores_give_exactly_k_over_v(world):
    store, split = world
    constant = Fixed(torch.full((store.num_users, store.num_items), 0.1))
    ranks = rank_targets(constant, EvalLoader(store, split.test, LAYOUT), mask_seen=False)
    for k in (1, 5, 10):
        np.testing.assert_allclose(per_target(ranks, f"hr@{k}"), k / store.num_items, rtol=1e-15)


def test_masking_reaches_events_that_the_batch_cuts_off(make_store):
    store = make_store([[0, 1, 2, 3, 4, 5, 6]], 8)
    split = make_split(LeaveOneOutConfig(), store)
    ranks = rank_targets(Fixed(torch.zeros(1, 8)), EvalLoader(store, split.test, LayoutConfig(max_events=2)), True)
    assert ranks.candidates.tolist() == [2] and ranks.tied.tolist() == [1]


def test_a_target_that_was_seen_is_a_miss_where_seen_items_are_masked(make_store):
    store = make_store([[3, 1, 2, 3]], 5)
    split = make_split(LeaveOneOutConfig(), store)
    table = torch.tensor([[0.0, 9.0, 9.0, 1.0, 0.0]])
    ranks = rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT), mask_seen=True)
    assert (ranks.better.tolist(), ranks.tied.tolist(), ranks.candidates.tolist()) == ([2], [0], [3])
    unmasked = rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT), mask_seen=False)
    assert (unmasked.better.tolist(), unmasked.candidates.tolist()) == ([2], [5])
    assert seen_mask(store, split.test.user, split.test.position).tolist() == [[False, True, True, True, False]]


def test_seen_items_are_each_event_once_by_table_and_by_sorting(make_store, random_users, monkeypatch):
    store = make_store([[2, 2, 1, 2, 1], [0], *random_users(9, 4)], 4)  # 4 items: most events repeat one
    user = np.array([3, 0, 1, 7, 0])
    length = np.diff(store.offsets)[user]
    position = np.array([length[0], 4, 0, length[3] - 1, 5])
    expected = sorted(
        {
            (row, int(item))
            for row, (u, p) in enumerate(zip(user, position, strict=True))
            for item in store.columns["item_id"][store.offsets[u] : store.offsets[u] + p]
        }
    )
    for limit in (1000, 0):
        monkeypatch.setattr("gr.evaluation.ranking.TABLE_PAIRS", limit)
        row, item = seen_pairs(store, user, position)
        assert row.tolist() == sorted(row.tolist())
        assert sorted(zip(row.tolist(), item.tolist(), strict=True)) == expected


@pytest.mark.parametrize("block", [2, 100])
def test_infinities_of_both_signs_are_no_nan(make_store, block):
    store = make_store([[0, 3, 4, 2], [1, 0, 3, 2]], 5)
    split = make_split(LeaveOneOutConfig(), store)
    table = torch.tensor([[torch.inf, 1.0, 1.0, -torch.inf, torch.inf], [0.0, -torch.inf, -torch.inf, 5.0, 2.0]])
    for mask_seen in (False, True):
        ranks = rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT), mask_seen, block=block)
        better, tied, candidates = slow_counts(store, split.test, table, mask_seen)
        np.testing.assert_array_equal(ranks.better, better)
        np.testing.assert_array_equal(ranks.tied, tied)
        np.testing.assert_array_equal(ranks.candidates, candidates)


def test_infinite_scores_are_compared_like_others(make_store):
    store = make_store([[0, 1, 0, 2]], 4)
    split = make_split(LeaveOneOutConfig(), store)
    table = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf]])
    ranks = rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT), mask_seen=True)
    assert (ranks.better.tolist(), ranks.tied.tolist()) == ([0], [1])


def test_a_job_of_two_processes_gives_the_ranks_of_one(world):
    store, split = world
    model = Fixed(coarse_table(store.num_users, store.num_items))
    alone = rank_targets(model, EvalLoader(store, split.test, LAYOUT, 4), True)
    loaders = [EvalLoader(store, split.test, LAYOUT, 4, rank, 2) for rank in range(2)]

    def counts_of(loader):
        class Stop(Exception):
            pass

        def catch(parts):
            raise Stop(parts)

        try:
            rank_targets(model, loader, True, gather=catch)
        except Stop as caught:
            return caught.args[0]

    everything = [counts_of(loader) for loader in loaders]
    joined = rank_targets(model, loaders[0], True, gather=lambda mine: everything)
    for name in ("user", "position", "target", "better", "tied", "candidates"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(alone, name))


def test_a_scorer_is_asked_once_a_batch(world):
    store, split = world
    asked = itertools.count()

    class Once(Fixed):
        def scorer(self, batch):
            next(asked)
            return lambda span: self.scores(batch, span)

    loader = EvalLoader(store, split.test, LAYOUT, 5)
    rank_targets(Once(coarse_table(store.num_users, store.num_items)), loader, True, block=4)
    assert next(asked) == len(loader)


def test_a_module_is_ranked_in_evaluation_mode_and_given_back_in_training_mode(world):
    store, split = world

    class Module(nn.Module):
        num_items = store.num_items

        def scores(self, batch, item_range):
            assert not self.training and not torch.is_grad_enabled()
            return torch.zeros(batch.num_sequences, item_range[1] - item_range[0])

    module = Module().train()
    rank_targets(module, EvalLoader(store, split.test, LAYOUT), False)
    assert module.training


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (torch.full((23, 17), torch.nan), "NaN scores"),
        (torch.zeros((23, 17), dtype=torch.int64), "gave torch.int64"),
        (torch.zeros((23, 16)), "scores 16 items but the log has 17"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(world, table, sentence):
    store, split = world
    with pytest.raises(UserError, match=sentence):
        rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT), False)


def test_one_nan_among_good_scores_is_refused(world):
    store, split = world
    table = coarse_table(store.num_users, store.num_items)
    table[split.test.user[-1], 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        rank_targets(Fixed(table), EvalLoader(store, split.test, LAYOUT), False, block=4)


def test_saved_ranks_reproduce_every_metric(world, tmp_path):
    store, split = world
    ranks = rank_targets(
        Fixed(coarse_table(store.num_users, store.num_items)), EvalLoader(store, split.test, LAYOUT), True
    )
    save_ranks(ranks, tmp_path / "ranks_test.parquet")
    again = load_ranks(tmp_path / "ranks_test.parquet")
    assert summarise(again) == summarise(ranks) and means(again) == means(ranks)
    assert again.num_items == store.num_items
    assert [path.name for path in tmp_path.iterdir()] == ["ranks_test.parquet"]


def test_a_ranks_file_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_ranks(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="broken.parquet cannot be read"):
        load_ranks(tmp_path / "broken.parquet")
