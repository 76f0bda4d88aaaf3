"""gr-plan prints the plan that training makes, counted by hand here; what does not fit is one sentence and status 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gr.distributed.plan import plan_tables
from gr.distributed.process import ProcessContext
from gr.errors import run_cli
from gr.launch.plan import count, main, parse_bytes, specs_of
from gr.models.retrieval import RetrievalModel
from gr.train import load_config
from tiny_runs import write

SHARDED = ["--distributed.tables.kind", "sharded", "--distributed.tables.optimizer.kind", "rowwise_adagrad"]
SAMPLED = ["--objective.kind", "sampled_softmax", "--objective.num_negatives", "10"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write(tmp_path))


def test_memory_and_traffic_are_those_counted_by_hand(config) -> None:
    made = load_config([config, *SHARDED, *SAMPLED, "--train.batching.batch_size", "8"])
    specs, dense = specs_of(made, 1001, None)
    cost = count(made, plan_tables(specs, made.distributed.tables, 4), dense, 4)
    assert cost.memory["tables"] == 251 * 16 * 4 and cost.memory["update rule"] == 251 * 4
    tokens = 8 * 12 // 4
    wanted = tokens * (2 + 10)
    assert cost.memory["vectors of a step"] == 4 * wanted * 16 * 4
    assert cost.traffic["ids"] == wanted * 8 * 3 // 4
    assert cost.traffic["vectors"] == cost.traffic["gradients of vectors"] == wanted * 16 * 4 * 3 // 4
    assert cost.traffic["gradients of the dense part"] == 2 * dense * 4 * 3 // 4


def test_a_softmax_over_all_items_scores_every_row_that_a_rank_has(config) -> None:
    made = load_config([config, *SHARDED, "--objective.kind", "full_softmax", "--train.batching.batch_size", "8"])
    specs, dense = specs_of(made, 1001, None)
    cost = count(made, plan_tables(specs, made.distributed.tables, 4), dense, 4)
    tokens, rows = 8 * 12 // 4, 251
    assert cost.memory["vectors of a step"] == (4 * tokens + 2 * rows) * 16 * 4
    assert cost.traffic["vectors"] == tokens * 16 * 4 * 3 // 4
    assert cost.traffic["full softmax"] == 3 * tokens * 4 * (16 + 2 * (3 + 16))


def test_negatives_of_the_batch_are_the_labels_of_all_ranks(config) -> None:
    made = load_config([config, *SHARDED, "--objective.kind", "in_batch", "--train.batching.batch_size", "8"])
    specs, dense = specs_of(made, 1001, None)
    cost = count(made, plan_tables(specs, made.distributed.tables, 4), dense, 4)
    tokens = 8 * 12 // 4
    assert cost.traffic["ids"] == tokens * (2 + 4) * 8 * 3 // 4


def test_the_dense_part_and_local_tables_are_the_models_own(config) -> None:
    made = load_config([config])
    specs, dense = specs_of(made, None, None)
    model = RetrievalModel(made.model, made.objective, num_items=120, num_actions=0, layout="items", max_tokens=12)
    assert dense == sum(p.numel() for p in model.dense_parameters())
    assert not any(p.is_meta for p in model.parameters()) and torch.get_default_device().type == "cpu"
    cost = count(made, plan_tables(specs, made.distributed.tables, 2), dense, 2)
    tables = sum(p.numel() for p in model.table_parameters())
    assert cost.memory["tables"] == 4 * tables and cost.memory["update rule"] == 12 * tables  # gradient, two moments
    assert ProcessContext().world == 1


@pytest.mark.parametrize(("kind", "numbers"), [("ddp", 4), ("zero1", 3), ("zero2", 2.5), ("fsdp2", 2)])
def test_what_processes_divide_of_the_dense_part_counts_less(config, kind, numbers) -> None:
    made = load_config([config, "--distributed.dense.kind", kind])
    specs, dense = specs_of(made, None, None)
    cost = count(made, plan_tables(specs, made.distributed.tables, 2), dense, 2)
    assert cost.memory["dense, gradients, moments"] == numbers * dense * 4
    assert cost.traffic.get("weights of the dense part", 0) == (dense * 4 if kind == "fsdp2" else 0)


def test_1500_billion_numbers_on_256_devices_of_80_gb_are_planned_and_on_64_refused(config, capsys) -> None:
    large = [config, *SHARDED, *SAMPLED, "--num-items", "2929687500", "--model.dim", "512", "--memory", "80GB"]
    large += ["--train.batching.batch_size", "4096", "--local-world-size", "8"]
    assert run_cli(main, [*large, "--world-size", "256"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1,500,000,000,000 numbers in tables, 256 ranks\n")
    assert "row_wise, 11,444,092 rows on each rank, 11,444,040 on the last" in said
    assert "97 % come from other machines" in said
    assert run_cli(main, [*large, "--world-size", "64"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: the fullest of 64 ranks holds") and told.err.count("\n") == 1
    assert told.err.endswith("; 128 ranks would do, or fewer with distributed.tables.rows fp16\n")
    assert run_cli(main, [*large, "--world-size", "16", "--distributed.tables.rows", "fp16"]) == 2
    assert re.search(r"; \d+ ranks would do\n$", capsys.readouterr().err)


def test_a_table_that_is_not_divided_as_asked_says_why(config, capsys) -> None:
    assert main([config, *SHARDED, "--world-size", "50"]) == 0
    assert "table_wise, whole on rank 0 (by rows, 3 to each, the last of 50 ranks would have none)\n" in (
        capsys.readouterr().out
    )
    assert main([config, *SHARDED, "--world-size", "4", "--distributed.tables.sharding", "table_wise"]) == 0
    assert "table_wise, whole on rank 0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--world-size", "0"], "invalid number value: '0'"),
        (["--world-size", "8", "--memory", "much"], "--memory much: must be a size"),
        (["--world-size", "8", "--memory", "80"], "--memory 80: must be a size such as 80GB"),
        (["--world-size", "8", "--local-world-size", "3"], "--local-world-size 3: must divide"),
        (["--world-size", "65"], "batch_size is 64; it must be at least the number of ranks, 65"),
        (["--world-size", "3", *SHARDED, "--distributed.tables.optimizer.kind", "adagrad",
          "--distributed.tables.sharding", "column_wise"], "16 columns, which 3 ranks cannot share"),
        (["--world-size", "8", "--layout.kind", "added"], "has a table of actions; name its size"),
        (["--world-size", "2", "--memory", "10KB"], "set distributed.tables.kind to sharded"),
        (["--world-size", "2", "--model.dims", "3"], "did you mean model.dim?"),
        ([], "--world-size"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_one_sentence_and_status_2(config, argv, sentence, capsys) -> None:
    assert run_cli(main, [config, *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1, said


def test_sizes_are_read_in_both_kinds_of_units() -> None:
    assert parse_bytes("80GB") == 80 * 10**9 and parse_bytes("75GiB") == 75 * 2**30
    assert parse_bytes("1.5tb") == 15 * 10**11
