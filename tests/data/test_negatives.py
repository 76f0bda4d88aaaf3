"""Negatives follow their law, never a float, and do not depend on how samples are dealt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gr.data.batch import Negatives
from gr.data.layout import LayoutConfig, training_batch, training_labels
from gr.data.negatives import InBatch, NegativesConfig, Popularity, Uniform, make_sampler, popularity
from gr.data.random_keys import draws, keyed
from gr.data.split import LeaveOneOutConfig, make_split, training_counts
from gr.data.store import memory_store
from gr.errors import UserError

LAYOUT = LayoutConfig(max_events=6)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    store = memory_store([rng.integers(0, 11, n) for n in rng.integers(4, 12, 40)], num_items=12)
    return store, make_split(LeaveOneOutConfig(), store)


def draw(world, config: NegativesConfig, users: list[int], seed: int = 5, step: int = 3) -> Negatives:
    store, split = world
    sampler = make_sampler(config, store, split)
    everyone = np.arange(8)
    batch = training_batch(store, split, LAYOUT, np.array(users))
    return sampler(batch, seed, step, lambda: training_labels(store, split, LAYOUT, everyone))


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch"])
@pytest.mark.parametrize("shared", [False, True])
def test_draws_do_not_depend_on_the_dealing(world, kind: str, shared: bool) -> None:
    config = NegativesConfig(kind, 7, shared)
    store, split = world
    whole = draw(world, config, list(range(8)))
    lengths = np.minimum(split.train_stop[:8] - 1, LAYOUT.max_events)
    cuts = np.concatenate([[0], np.cumsum(lengths)])
    for users in ([3, 0, 6], [7], [1, 2, 4, 5]):
        part = draw(world, config, users)
        rows = np.concatenate([np.arange(cuts[u], cuts[u + 1]) for u in users])
        own = kind == "in_batch" or shared
        torch.testing.assert_close(part.ids, whole.ids if own else whole.ids[rows])
        if kind == "uniform":
            assert part.log_q is None and part.positive_log_q is None
        else:
            torch.testing.assert_close(part.log_q, whole.log_q if own else whole.log_q[rows])
            torch.testing.assert_close(part.positive_log_q, whole.positive_log_q[rows])


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_every_part_of_the_key_changes_the_draw(world, kind: str) -> None:
    config = NegativesConfig(kind, 16)
    first = draw(world, config, [0, 1]).ids
    assert not torch.equal(first, draw(world, config, [0, 1], seed=6).ids)
    assert not torch.equal(first, draw(world, config, [0, 1], step=4).ids)
    assert len({tuple(row) for row in first.tolist()}) == len(first)  # users and labels differ too
    torch.testing.assert_close(first, draw(world, config, [0, 1]).ids)


@pytest.mark.parametrize("bound", [1, 3, 1000, 2**20, 2**20 + 1])
def test_draws_are_uniform(bound: int) -> None:
    values = draws(keyed(1, np.arange(500)), 401, bound)
    assert values.shape == (500, 401) and values.min() >= 0 and values.max() < bound
    cells = min(bound, 100)
    seen = np.bincount((values * cells // bound).ravel(), minlength=cells)
    expected = values.size / cells
    # Chi-square over cells-1 degrees of freedom: mean cells-1, standard deviation sqrt(2 (cells-1)).
    excess = ((seen - expected) ** 2 / expected).sum() - (cells - 1)
    assert excess <= 5 * np.sqrt(2 * (cells - 1)) + 0.02 * cells


def test_neighbouring_draws_are_independent() -> None:
    values = draws(keyed(2, np.arange(400)), 300, 4).astype(float)
    for a, b in ((values[:, ::2], values[:, 1::2]), (values[:-1], values[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_popularity_draws_in_proportion_to_smoothed_counts() -> None:
    counts = np.array([0, 9, 29, 59])
    config = NegativesConfig("popularity", 500)
    sampler = popularity(config, counts)
    seen = np.bincount(sampler.items(keyed(np.arange(400))).ravel(), minlength=4) / 200_000
    share = (counts + 1) / 101
    np.testing.assert_allclose(seen, share, atol=5 * 0.5 / np.sqrt(200_000))
    np.testing.assert_allclose(sampler.log_q.numpy(), np.log(500 * share), rtol=1e-6)


def test_popularity_draws_the_same_with_and_without_its_table() -> None:
    sampler = popularity(NegativesConfig("popularity", 64), np.random.default_rng(0).integers(0, 50, 300))
    assert sampler.table is not None
    words = keyed(np.arange(100))
    searching = Popularity(sampler.config, sampler.cumulative, None)
    np.testing.assert_array_equal(sampler.items(words), searching.items(words))


def test_popularity_is_fitted_on_training_events_only(world) -> None:
    store, split = world
    sampler = make_sampler(NegativesConfig("popularity", 1), store, split)
    np.testing.assert_array_equal(np.diff(sampler.cumulative, prepend=0), training_counts(store, split) + 1)


def test_in_batch_negatives_are_the_distinct_labels_of_the_global_batch(world) -> None:
    store, split = world
    drawn = draw(world, NegativesConfig("in_batch"), [2, 3])
    labels = training_labels(store, split, LAYOUT, np.arange(8))
    assert drawn.ids.tolist() == sorted(set(labels.tolist()))
    counts = training_counts(store, split)
    share = counts[drawn.ids.numpy()] / counts.sum()
    np.testing.assert_allclose(drawn.log_q.numpy(), np.log(1 - (1 - share) ** labels.size), rtol=1e-5)


def test_in_batch_log_q_keeps_rare_items_and_a_lone_one() -> None:
    rare = InBatch(np.array([1, 10**10 - 1])).log_q(np.array([0]), 100)
    np.testing.assert_allclose(rare.numpy(), np.log(100 * 1e-10), rtol=1e-6)
    assert InBatch(np.array([5])).log_q(np.array([0]), 3).tolist() == [0.0]


@pytest.mark.parametrize("items", [2**24 + 5, 2**31 + 7, 2**53 + 9, 2**62])
def test_huge_dense_ids_come_through_exactly(items: int) -> None:
    rng = np.random.default_rng(1)
    top = [items - 1 - rng.integers(0, 1000, 8) for _ in range(3)]
    store = memory_store(top, [np.arange(8)] * 3, [np.arange(8) % 2] * 3, num_items=items)
    split = make_split(LeaveOneOutConfig(), store)
    for kind in ("items", "interleaved", "added"):
        batch = training_batch(store, split, LayoutConfig(kind), np.arange(3))
        assert batch.labels.item_id.tolist() == [int(i) for row in top for i in row[1:6]]
        step = 2 if kind == "interleaved" else 1
        assert batch.tokens["item_id"][::step].tolist() == [int(i) for row in top for i in row[:5]]
        drawn = Uniform(NegativesConfig("uniform", 2000), items)(batch, 0, 0, lambda: top[0])
        assert drawn.ids.dtype == torch.int64 and drawn.ids.shape == (15, 2000)
        assert drawn.ids.min() >= 0 and items * 0.999 < drawn.ids.max() < items
        assert (drawn.ids % 2).float().mean().sub(0.5).abs() < 0.02  # odd ids live: no float on the way


def test_kind_none_draws_none_and_zero_negatives_are_refused(world) -> None:
    assert make_sampler(NegativesConfig("none"), *world) is None
    with pytest.raises(UserError, match="num is 0"):
        NegativesConfig(num=0)
