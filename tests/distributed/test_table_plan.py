"""Who holds which part of which table, and what cannot be."""

from __future__ import annotations

import pytest
import torch

from gr import config as configs
from gr.distributed.plan import plan_tables, slice_of
from gr.embedding.config import TablesConfig
from gr.embedding.spec import TableSpec
from gr.errors import UserError
from gr.training.run_config import RunConfig

SPECS = (TableSpec("item", 121, 16), TableSpec("action", 2, 16), TableSpec("shop", 40, 16))


def tables_config(**parts) -> TablesConfig:
    return configs.from_dict(TablesConfig, {"kind": "sharded", "optimizer": {"kind": "sgd"}, **parts}, "test")


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_every_number_of_every_table_is_held_once(sharding, world):
    if sharding == "column_wise" and world in (3, 8):
        pytest.skip("16 columns are refused there")
    plans = plan_tables(SPECS, tables_config(sharding=sharding), world)
    assert tuple(plan.spec for plan in plans) == SPECS
    for plan in plans:
        held = torch.zeros(plan.spec.num_rows, plan.spec.dim)
        for shard in plan.shards:
            assert 0 <= shard.rank < world and shard.rows > 0 and shard.cols > 0
            held[shard.row : shard.row + shard.rows, shard.col : shard.col + shard.cols] += 1
        assert held.eq(1).all()


def test_whole_tables_go_to_who_holds_least_and_a_table_of_few_rows_stays_whole():
    whole = {plan.spec.name: plan.shards for plan in plan_tables(SPECS, tables_config(sharding="table_wise"), 2)}
    assert [whole[name][0].rank for name in ("item", "shop", "action")] == [0, 1, 1]
    by_rows = {plan.spec.name: plan for plan in plan_tables(SPECS, tables_config(), 3)}
    assert [(s.row, s.rows) for s in by_rows["item"].shards] == [(0, 41), (41, 41), (82, 39)]
    assert by_rows["action"].sharding == "table_wise"
    mixed = {plan.spec.name: plan for plan in plan_tables(SPECS, tables_config(constraints={"shop": "table_wise"}), 2)}
    assert mixed["shop"].sharding == "table_wise" and mixed["item"].sharding == "row_wise"


@pytest.mark.parametrize(("num_rows", "world"), [(121, 2), (121, 3), (2, 3), (10, 4)])
def test_slices_are_all_rows_in_order(num_rows, world):
    spans = [slice_of(num_rows, world, rank) for rank in range(world)]
    assert [row for lo, hi in spans for row in range(lo, hi)] == list(range(num_rows))


def test_what_cannot_be_divided_is_one_sentence():
    for world in (3, 8):
        with pytest.raises(UserError, match=f"table 'item' has 16 columns, which {world} ranks cannot share"):
            plan_tables(SPECS, tables_config(sharding="column_wise"), world)
    with pytest.raises(UserError, match="names table 'itme'; this model has item, action, shop"):
        plan_tables(SPECS, tables_config(constraints={"itme": "row_wise"}), 2)


def test_what_kernels_cannot_do_is_one_sentence():
    with pytest.raises(UserError, match="optimizer.kind is 'adamw', but sharded tables learn while gradients arrive"):
        tables_config(optimizer={"kind": "adamw"})
    for parts in ({"sharding": "column_wise"}, {"constraints": {"item": "column_wise"}}):
        with pytest.raises(UserError, match="'column_wise', but optimizer.kind is 'rowwise_adagrad'"):
            tables_config(optimizer={"kind": "rowwise_adagrad"}, **parts)
    with pytest.raises(UserError, match="rows is 'fp16', but optimizer.kind is 'adamw'"):
        TablesConfig(rows="fp16")


def test_a_run_keeps_its_hash_while_its_tables_say_nothing_that_is_learned():
    """Recorded results are found by the hash; where tables lie does not change what they learn, the rule does."""
    plain = {"data": {"kind": "planted"}}
    hashes = [
        configs.config_hash(configs.from_dict(RunConfig, plain | {"distributed": {"tables": tables}}, "test"))
        for tables in ({}, {"optimizer": {"kind": "sgd"}}, {"optimizer": {"kind": "sgd"}, "kind": "sharded"})
    ]
    assert hashes[0] == configs.config_hash(configs.from_dict(RunConfig, plain, "test"))
    assert hashes[1] == hashes[2] != hashes[0]


def test_tables_are_sharded_by_overrides_in_any_order():
    words = ["--distributed.tables.optimizer.lr", "0.5", "--distributed.tables.optimizer.kind", "adagrad"]
    kind = ["--distributed.tables.kind", "sharded"]
    for overrides in (words + kind, kind + words):
        raw = configs.apply_overrides({"data": {"kind": "planted"}}, overrides)
        tables = configs.from_dict(RunConfig, raw, "test").distributed.tables
        assert (tables.kind, tables.optimizer.kind, tables.optimizer.lr) == ("sharded", "adagrad", 0.5)
