"""Ids that share rows of a table: which do, how many, and what follows for scores, losses and ranks."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch

from gr.config import config_hash, from_dict
from gr.data.layout import LayoutConfig
from gr.data.loader import EvalLoader
from gr.data.split import LeaveOneOutConfig, make_split
from gr.data.store import memory_store
from gr.embedding.hashing import expected_sharing, hashed, ids_of_rows, key_of, sharing
from gr.embedding.local import LocalTables
from gr.embedding.spec import TableSpec
from gr.errors import UserError
from gr.evaluation import ranking
from gr.evaluation.ranking import rank_targets
from gr.models.retrieval import ModelConfig, table_specs
from gr.training.run_config import RunConfig

SPEC = TableSpec("item", 40, 6, hashed_ids=100)


def by_hand(number: int, num_rows: int, table: str) -> int:
    """splitmix64's finaliser in Python's integers, which do not wrap by themselves."""
    whole = 2**64
    word = (number + int.from_bytes(hashlib.sha256(table.encode()).digest()[:8], "little")) % whole
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % whole
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % whole
    return ((word ^ (word >> 31)) >> 1) % num_rows


@pytest.mark.parametrize("num_rows", [1, 2, 1000, 2**20, 2**31 + 1])
def test_a_row_is_that_of_the_formula_in_unbounded_integers(num_rows):
    ids = [0, 1, 2, 3, 121, 2**31, 2**53 + 1, 2**62]
    for table in ("item", "shop"):
        found = hashed(torch.tensor(ids), num_rows, key_of(table))
        assert found.tolist() == [by_hand(number, num_rows, table) for number in ids]


def test_rows_never_change():
    assert hashed(torch.arange(6), 2**20, key_of("item")).tolist() == [208887, 440301, 862473, 368605, 486139, 556376]


@pytest.mark.parametrize(("num_ids", "num_rows"), [(1, 3), (2, 1), (3, 2), (4, 3), (5, 2)])
def test_the_expected_rate_is_the_mean_over_every_way_to_choose_rows(num_ids, num_rows):
    ways = itertools.product(range(num_rows), repeat=num_ids)
    rates = [sharing(np.bincount(way, minlength=num_rows)) for way in ways]
    assert expected_sharing(num_ids, num_rows) == pytest.approx(np.mean(rates), rel=1e-12)


@pytest.mark.parametrize(("num_ids", "num_rows"), [(1000, 1000), (3000, 500), (200, 5000)])
def test_measured_rates_scatter_around_the_expected_one(num_ids, num_rows):
    rates = np.array([sharing(ids_of_rows(num_ids, num_rows, key_of(f"table {i}"))) for i in range(200)])
    error = rates.std(ddof=1) / 200**0.5
    assert abs(rates.mean() - expected_sharing(num_ids, num_rows)) < 4 * max(error, 1e-6)


def test_counts_of_rows_are_those_of_all_ids(monkeypatch):
    monkeypatch.setattr("gr.embedding.hashing._BLOCK", 7)
    rows = SPEC.rows_of(torch.arange(100)).numpy()
    np.testing.assert_array_equal(SPEC.row_counts, np.bincount(rows, minlength=40))
    alone = sum(int((rows == row).sum() == 1) for row in rows)
    assert sharing(SPEC.row_counts) == pytest.approx(1 - alone / 100)
    assert TableSpec("item", 5, 2).row_counts.tolist() == [1] * 5


def test_a_hashed_table_answers_as_a_table_of_all_ids_would():
    tables = LocalTables((SPEC,))
    whole = tables.weights["item"][SPEC.rows_of(torch.arange(100))]
    ids = torch.tensor([[0, 99, 5], [5, 7, 0]])
    assert torch.equal(tables({"item": ids})["item"], whole[ids])
    query = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for lo, hi in ((0, 100), (0, 40), (13, 29), (99, 100)):
        logits = tables.logits(query, "item", (lo, hi), lambda vectors: 2 * vectors)
        torch.testing.assert_close(logits, query @ (2 * whole[lo:hi]).T)
    target, weight = torch.tensor([0, 3, 50, 99]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    loss = tables.full_softmax(query, "item", target, weight, lambda vectors: vectors)
    each = torch.nn.functional.cross_entropy(query @ whole.T, target, reduction="none")
    torch.testing.assert_close(loss, (each * weight).sum())
    (got,) = torch.autograd.grad(loss, [tables.weights["item"]], retain_graph=True)
    (wanted,) = torch.autograd.grad((each * weight).sum(), [tables.weights["item"]])
    torch.testing.assert_close(got, wanted)


class Scored:
    """Scores of rows that a batch's users alone decide; ``item_rows`` as told."""

    num_items = 100

    def __init__(self, shared: TableSpec | None) -> None:
        self.item_rows = shared
        self.values = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))

    def row_scorer(self, batch):
        return lambda span: self.values[batch.rows["sample_key"]][:, span[0] : span[1]]

    def scores(self, batch, span):
        return self.values[batch.rows["sample_key"]][:, SPEC.rows_of(torch.arange(*span))]


@pytest.mark.parametrize("mask_seen", [False, True, "window"])
@pytest.mark.parametrize("block", [65536, 7])
def test_ranks_over_rows_are_those_over_items_with_their_ties(mask_seen, block):
    rng = np.random.default_rng(0)
    store = memory_store([rng.integers(0, 100, rng.integers(3, 30)) for _ in range(60)], num_items=100)
    loader = EvalLoader(store, make_split(LeaveOneOutConfig(), store).test, LayoutConfig("items", 5), 16)
    over_items = rank_targets(Scored(None), loader, mask_seen)
    over_rows = rank_targets(Scored(SPEC), loader, mask_seen, block=block)
    for name in ranking.COLUMNS:
        np.testing.assert_array_equal(getattr(over_rows, name), getattr(over_items, name), err_msg=name)
    assert (over_rows.tied > 0).mean() > 0.5


def test_only_fewer_rows_than_items_make_sense():
    specs = table_specs(ModelConfig(item_rows=99), num_items=100, num_actions=3, layout="added")
    assert [(spec.num_rows, spec.num_ids) for spec in specs] == [(99, 100), (3, 3)]
    with pytest.raises(UserError, match="item_rows is 100, but there are 100 items"):
        table_specs(ModelConfig(item_rows=100), num_items=100, num_actions=0, layout="items")
    with pytest.raises(UserError, match="item_rows is -1"):
        ModelConfig(item_rows=-1)


def test_runs_without_hashing_keep_their_hash():
    plain = from_dict(RunConfig, {}, "a test")
    assert config_hash(from_dict(RunConfig, {"model": {"item_rows": 0}}, "a test")) == config_hash(plain)
    assert config_hash(from_dict(RunConfig, {"model": {"item_rows": 9}}, "a test")) != config_hash(plain)
