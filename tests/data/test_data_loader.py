"""The loader gives one run: the same for any number of ranks, and any resumption."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data.batch import JaggedBatch
from gr.data.layout import LayoutConfig
from gr.data.loader import BatchingConfig, EvalLoader, TrainLoader, deal
from gr.data.negatives import NegativesConfig, make_sampler
from gr.data.split import LeaveOneOutConfig, Split, make_split
from gr.data.store import EventStore, memory_store
from gr.errors import UserError

LAYOUTS = [LayoutConfig("items", 8), LayoutConfig("interleaved", 5), LayoutConfig("added", 50)]
BATCHINGS = [BatchingConfig(7), BatchingConfig(0, 130)]


@pytest.fixture(scope="module")
def world() -> tuple[EventStore, Split]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 50)
    store = memory_store(
        [rng.integers(0, 30, n) for n in lengths],
        [np.sort(rng.integers(0, 1000, n)) for n in lengths],
        [rng.integers(0, 2, n) for n in lengths],
        num_items=30,
    )
    return store, make_split(LeaveOneOutConfig(), store)


def loader(data, layout=LAYOUTS[0], batching=BATCHINGS[0], negatives="uniform", seed=1, **fields) -> TrainLoader:
    sampler = make_sampler(NegativesConfig(negatives, 4), *data)
    return TrainLoader(*data, layout, batching, sampler, seed, **fields)


def by_user(batch: JaggedBatch) -> dict[int, dict[str, list]]:
    """Each row of a batch, whatever its place."""
    rows = {}
    for place, user in enumerate(batch.rows["sample_key"].tolist()):
        lo, hi = batch.offsets[place].item(), batch.offsets[place + 1].item()
        row = {name: values[lo:hi].tolist() for name, values in {**batch.tokens, **batch.index}.items()}
        mine = (batch.labels.position >= lo) & (batch.labels.position < hi)
        row["position"] = (batch.labels.position[mine] - lo).tolist()
        row["label"] = batch.labels.item_id[mine].tolist()
        drawn = batch.negatives
        if drawn is not None:
            row["negatives"] = (drawn.ids if drawn.ids.dim() == 1 else drawn.ids[mine]).tolist()
            if drawn.log_q is not None:
                row["log_q"] = (drawn.log_q if drawn.log_q.dim() == 1 else drawn.log_q[mine]).tolist()
                row["positive_log_q"] = drawn.positive_log_q[mine].tolist()
        rows[user] = row
    return rows


def same(one: JaggedBatch, two: JaggedBatch) -> None:
    torch.testing.assert_close(one.offsets, two.offsets, rtol=0, atol=0)
    assert by_user(one) == by_user(two)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda c: c.kind)
@pytest.mark.parametrize("batching", BATCHINGS, ids=["sequences", "tokens"])
@pytest.mark.parametrize("negatives", ["none", "uniform", "popularity", "in_batch"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_together_hold_the_global_batch(world, layout, batching, negatives, ranks) -> None:
    one = loader(world, layout, batching, negatives)
    many = [loader(world, layout, batching, negatives, rank=r, world=ranks) for r in range(ranks)]
    assert {m.num_batches(0) for m in many} == {one.num_batches(0)}
    for index in range(one.num_batches(0)):
        parts = [by_user(m.batch(0, index)) for m in many]
        assert all(parts)
        union = {user: row for part in parts for user, row in part.items()}
        assert sum(map(len, parts)) == len(union)
        assert union == by_user(one.batch(0, index))


@pytest.mark.parametrize("batching", BATCHINGS, ids=["sequences", "tokens"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_holds_each_user_with_a_label_once(world, batching, ranks) -> None:
    _, split = world
    train = loader(world, batching=batching, world=ranks)
    for epoch in range(3):
        plan = train.plan(epoch)
        assert sorted(np.concatenate(plan).tolist()) == np.flatnonzero(split.train_stop >= 2).tolist()
        assert min(map(len, plan)) >= ranks
    assert train.users.size < split.train_stop.size  # some users have no label, and none of them is planned


def test_batches_keep_their_size_or_their_budget(world) -> None:
    sizes = [len(users) for users in loader(world).plan(0)]
    assert set(sizes[:-1]) == {7} and sizes[-1] <= 7
    train = loader(world, batching=BatchingConfig(0, 60))
    tokens = [train.batch(0, i).num_tokens for i in range(train.num_batches(0))]
    assert max(tokens) <= 60
    longest = LAYOUTS[0].max_tokens
    assert min(tokens[:-1]) > 60 - longest  # the next row did not fit


def test_a_row_longer_than_the_budget_stands_alone(world) -> None:
    train = loader(world, batching=BatchingConfig(0, 1))
    assert all(len(users) == 1 for users in train.plan(0))


def test_a_tail_smaller_than_the_ranks_joins_the_batch_before(world) -> None:
    users = loader(world).users.size
    size = next(s for s in range(4, users) if users % s == 1)
    sizes = [len(batch) for batch in loader(world, batching=BatchingConfig(size), world=3).plan(0)]
    assert sizes[-1] == size + 1 and set(sizes[:-1]) <= {size}


def test_plans_depend_on_seed_and_epoch_alone(world) -> None:
    def flat(train: TrainLoader, epoch: int) -> list[int]:
        return np.concatenate(train.plan(epoch)).tolist()

    assert flat(loader(world), 2) == flat(loader(world, LAYOUTS[1], rank=1, world=2), 2)
    assert flat(loader(world), 0) != flat(loader(world), 1)
    assert flat(loader(world), 0) != flat(loader(world, seed=2), 0)


@pytest.mark.parametrize("batching", BATCHINGS, ids=["sequences", "tokens"])
def test_a_batch_asked_for_alone_is_the_one_of_the_whole_run(world, batching) -> None:
    fields = {"batching": batching, "rank": 1, "world": 2}
    whole = loader(world, **fields)
    places = [(epoch, index) for epoch in range(2) for index in range(whole.num_batches(epoch))]
    run = [whole.batch(*place) for place in places]
    for place, one in reversed(list(zip(places, run, strict=True))):
        same(one, loader(world, **fields).batch(*place))


def test_a_given_step_keys_the_negatives(world) -> None:
    train = loader(world)
    first, second = train.batch(0, 0, step=1), train.batch(0, 0, step=2)
    assert not torch.equal(first.negatives.ids, second.negatives.ids)
    torch.testing.assert_close(first.tokens["item_id"], second.tokens["item_id"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=4, max_size=60), st.integers(1, 4))
def test_dealing_is_a_partition_that_balances(costs: list[int], world: int) -> None:
    values = np.array(costs)
    parts = deal(values, world)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    assert len(parts) == world and all(len(part) for part in parts)
    loads = [values[part].sum() for part in parts]
    # The last row of the dearest rank went to the least loaded one, which carried no more than the mean.
    assert (max(loads) - max(costs)) * world <= sum(costs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=7), st.integers(2, 3))
def test_dealing_is_within_a_third_of_the_best(costs: list[int], world: int) -> None:
    """Graham's bound for LPT, 4/3 - 1/(3 world), against every assignment there is."""
    values = np.array(costs)
    dealt = max(values[part].sum() for part in deal(values, world))
    choices = np.array(list(itertools.product(range(world), repeat=len(costs))))
    best = np.stack([(values * (choices == rank)).sum(1) for rank in range(world)]).max(0).min()
    assert 3 * world * dealt <= (4 * world - 1) * best


def test_costs_count_pairs_and_tokens(world) -> None:
    train = loader(world, LAYOUTS[1])
    batch = train.batch(0, 0)
    lengths = np.diff(batch.offsets)
    expected = lengths * (lengths + 1) // 2 + 1024 * lengths
    assert train.costs(batch.rows["sample_key"].numpy()).tolist() == expected.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_batches_do_not_depend_on_the_ranks(world, ranks) -> None:
    store, split = world
    whole = list(EvalLoader(store, split.test, LAYOUTS[0], 8))
    parts = [list(EvalLoader(store, split.test, LAYOUTS[0], 8, rank=r, world=ranks)) for r in range(ranks)]
    for index, (rows, batch) in enumerate(whole):
        again, part = parts[index % ranks][index // ranks]
        assert again.tolist() == rows.tolist()
        same(part, batch)
        assert batch.rows["sample_key"].tolist() == split.test.user[rows].tolist()
    assert sum(map(len, parts)) == len(whole)
    assert [len(EvalLoader(store, split.test, LAYOUTS[0], 8, r, ranks)) for r in range(ranks)] == [*map(len, parts)]
    assert np.concatenate([rows for rows, _ in whole]).tolist() == list(range(len(split.test)))


def test_huge_dense_ids_come_through_the_loader() -> None:
    top = 2**53 + 3
    store = memory_store([top - np.arange(6)] * 4, num_items=top + 1)
    split = make_split(LeaveOneOutConfig(), store)
    sampler = make_sampler(NegativesConfig("uniform", 3), store, split)
    batch = TrainLoader(store, split, LayoutConfig(), BatchingConfig(4), sampler, 0).batch(0, 0)
    assert batch.labels.item_id[:3].tolist() == [top - 1, top - 2, top - 3]
    assert batch.negatives.ids.dtype == torch.int64


@pytest.mark.parametrize(("size", "tokens"), [(0, 0), (5, 5), (-1, 0), (0, -3)])
def test_a_batch_has_exactly_one_size(size: int, tokens: int) -> None:
    with pytest.raises(UserError, match="exactly one"):
        BatchingConfig(size, tokens)


def test_too_many_ranks_are_refused(world) -> None:
    with pytest.raises(UserError, match="at least the number of ranks, 8"):
        loader(world, world=8)
    with pytest.raises(UserError, match="100 ranks need at least one user each"):
        loader(world, world=100)


def test_an_empty_evaluation_batch_is_refused(world) -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        EvalLoader(world[0], world[1].test, LAYOUTS[0], 0)
