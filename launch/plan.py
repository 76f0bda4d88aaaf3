"""``gr-plan CONFIG --world-size N``: which table lies where, and what a rank holds and exchanges, without the devices.

    gr-plan configs/quickstart.yaml --world-size 64
    gr-plan configs/my-data.yaml --world-size 256 --num-items 3e9 --memory 80GB --local-world-size 8 --model.dim 512

The plan is the one that training makes of the same config (``gr.distributed.plan``). Bytes are counted from it, not
measured: tables and what their update rule keeps, dense parameters with gradients and AdamW's two moments, vectors of a
step. Not counted are the encoder's activations and what libraries take: for those a share of the memory is left free.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gr.data.planted import PlantedConfig
from gr.distributed.plan import Shard, TablePlan, plan_tables, row_block
from gr.embedding.config import TablesConfig
from gr.embedding.spec import TableSpec
from gr.errors import Parser, UserError, run_cli
from gr.models.retrieval import RetrievalModel
from gr.train import load_config

FREE = 0.15
"""Share of the memory that is left for activations and libraries, as torchrec's planner leaves."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FP32, _ID = 4, 8


@dataclass(frozen=True)
class Cost:
    """Bytes of the fullest rank, and bytes that an average rank receives in a step.

    Attributes:
        memory: By what takes it.
        traffic: By what is exchanged.
    """

    memory: dict[str, int]
    traffic: dict[str, int]

    @property
    def held(self) -> int:
        """All memory."""
        return sum(self.memory.values())


def parse_bytes(text: str) -> int:
    """``80GB`` (10**9) or ``80GiB`` (2**30) in bytes.

    Raises:
        UserError: Neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"--memory {text}: must be a size such as 80GB or 75GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def specs_of(config: Any, num_items: int | None, num_actions: int | None) -> tuple[tuple[TableSpec, ...], int]:
    """The model's tables, and how many numbers its dense part has; nothing is allocated.

    Raises:
        UserError: The number of items, or of kinds of action, is known neither from the config nor from the caller.
    """
    items = num_items or (config.data.num_items if isinstance(config.data, PlantedConfig) else None)
    if items is None:
        raise UserError("this config's data tell the number of items only when prepared; name it: --num-items 1e6")
    kept: list[TableSpec] = []

    def note(specs: tuple[TableSpec, ...]) -> nn.Module:
        kept.extend(specs)
        return nn.Module()

    with torch.device("meta"):
        model = RetrievalModel(
            config.model,
            config.objective,
            num_items=items,
            num_actions=num_actions or 1,
            layout=config.layout.kind,
            max_tokens=config.layout.max_tokens,
            make_tables=note,
        )
    if config.layout.kind != "items" and num_actions is None:
        raise UserError(f"layout.kind {config.layout.kind!r} has a table of actions; name its size: --num-actions 5")
    return tuple(kept), sum(parameter.numel() for parameter in model.parameters())


def count(config: Any, plans: tuple[TablePlan, ...], dense: int, world: int) -> Cost:
    """What a rank holds and receives; see the module for what is counted."""
    tables = config.distributed.tables
    sharded = tables.kind == "sharded" and world > 1
    row = 2 if tables.rows == "fp16" else _FP32
    batching, length = config.train.batching, config.layout.max_tokens
    tokens = -(-(batching.tokens_per_batch or batching.batch_size * length) // world)
    negatives = config.objective.negatives()
    each = negatives.num if negatives.shared else tokens * negatives.num
    drawn = {"none": 0, "in_batch": tokens * world}.get(negatives.kind, each)
    width = max(plan.spec.dim for plan in plans)
    away = (world - 1) / world
    held, kept = [0] * world, [0] * world
    lookups, ids = 0, 0.0
    for plan in plans:
        whole = (Shard(rank, 0, plan.spec.num_rows, 0, plan.spec.dim) for rank in range(world))
        for shard in plan.shards if sharded else whole:
            numbers = shard.rows * shard.cols
            rule = {"sgd": 0, "adagrad": numbers, "rowwise_adagrad": shard.rows, "adamw": 3 * numbers}
            held[shard.rank] += numbers * row
            kept[shard.rank] += rule[tables.optimizer.kind] * _FP32
        wanted = tokens
        if plan.spec.name == "item" and drawn:  # the label of each token, and its negatives
            wanted += tokens + min(drawn, plan.spec.num_ids)
        lookups += wanted
        ids += wanted * (world - 1 if plan.sharding == "column_wise" else away)
    # Asked and answered vectors, and the gradients of both.
    step = 4 * lookups * width * _FP32
    scored = 0
    if not drawn:  # the rows that this rank scores, looked up, and their gradient
        items = next(plan.spec.num_ids for plan in plans if plan.spec.name == "item")
        scored = 2 * -(-items // (world if sharded else 1)) * width
    fullest = max(range(world), key=lambda rank: held[rank] + kept[rank])
    memory = {
        "tables": held[fullest],
        "update rule": kept[fullest],
        "dense, gradients, moments": int(_dense_share(config.distributed.dense.kind, world) * dense * _FP32),
        "vectors of a step": step + scored * _FP32,
    }
    traffic = {"gradients of the dense part": int(2 * away * dense * _FP32)}
    if config.distributed.dense.kind == "fsdp2":  # gathered forward and backward; a gradient goes to one rank only
        traffic["weights of the dense part"] = traffic["gradients of the dense part"]
        traffic["gradients of the dense part"] //= 2
    if sharded:
        traffic |= {"ids": int(ids * _ID), "vectors": int(away * lookups * width * _FP32)}
        traffic["gradients of vectors"] = traffic["vectors"]
        if not drawn:
            everybody = tokens * world
            traffic["full softmax"] = int(away * everybody * _FP32 * (width + 2 * (3 + width)))
    elif world > 1:
        numbers = sum(plan.spec.num_rows * plan.spec.dim for plan in plans)
        traffic["gradients of tables"] = int(2 * away * numbers * _FP32)
    return Cost(memory, traffic)


def _dense_share(kind: str, world: int) -> float:
    """Numbers a rank holds for each dense parameter: weight, gradient, two moments; less what processes divide.

    While a block works its weights are gathered (fsdp2), and the bare model holds all of them at validation and saving;
    that is not counted.
    """
    divided = {"ddp": 0, "zero1": 2, "zero2": 3, "fsdp2": 4}[kind]
    return 4 - divided + divided / world


def lines(plans: tuple[TablePlan, ...], tables: TablesConfig, cost: Cost, world: int, local: int) -> Iterator[str]:
    """The plan in words."""
    sharded = tables.kind == "sharded" and world > 1
    numbers = sum(plan.spec.num_rows * plan.spec.dim for plan in plans)
    yield f"{numbers:,} numbers in tables, {world} ranks"
    for plan in plans:
        size = f"{plan.spec.num_rows:,} x {plan.spec.dim}"
        first = plan.shards[0]
        if not sharded:
            where = "whole on every rank"
        elif plan.sharding == "table_wise":
            where = f"whole on rank {first.rank}"
            if tables.sharding_of(plan.spec.name) == "row_wise":
                block = row_block(plan.spec.num_rows, world)
                where += f" (by rows, {block:,} to each, the last of {world} ranks would have none)"
        elif plan.sharding == "row_wise":
            last = plan.shards[-1].rows
            where = f"{first.rows:,} rows on each rank" + (f", {last:,} on the last" if last != first.rows else "")
        else:
            where = f"{first.cols} columns on each rank"
        yield f"table {plan.spec.name}: {size}, {plan.sharding if sharded else 'local'}, {where}"
    yield "memory of the fullest rank:"
    yield from (f"  {what:<28} {_shown(size):>10}" for what, size in cost.memory.items())
    yield f"  {'all':<28} {_shown(cost.held):>10}"
    yield "received by a rank in a step:"
    yield from (f"  {what:<28} {_shown(size):>10}" for what, size in cost.traffic.items())
    if 1 < local < world:
        share = (world - local) / (world - 1)
        yield f"  of the exchanged vectors {100 * share:.0f} % come from other machines ({local} ranks a machine)"


def _shown(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def check_fits(config: Any, specs: tuple[TableSpec, ...], dense: int, world: int, memory: int) -> None:
    """Refuses a plan that does not fit.

    Raises:
        UserError: It says by how much, and a number of ranks that would do, if there is one.
    """
    tables = config.distributed.tables
    cost = count(config, plan_tables(specs, tables, world), dense, world)
    usable = int(memory * (1 - FREE))
    if cost.held <= usable:
        return
    advice = "set distributed.tables.kind to sharded"
    if tables.kind == "sharded":
        halved = tables.rows == "fp16"
        advice = "no number of ranks up to 65536 would do; use smaller tables" + (
            "" if halved else " or distributed.tables.rows fp16"
        )
        more = 2 * world
        while more <= 65_536:
            try:
                enough = count(config, plan_tables(specs, tables, more), dense, more).held <= usable
            except UserError:
                enough = False
            if enough:
                advice = f"{more} ranks would do" + ("" if halved else ", or fewer with distributed.tables.rows fp16")
                break
            more *= 2
    raise UserError(
        f"the fullest of {world} ranks holds {_shown(cost.held)}, and {_shown(usable)} of {_shown(memory)} are for it "
        f"({100 * FREE:.0f} % are left for activations); {advice}"
    )


def _number(text: str) -> int:
    value = float(text)
    if value != int(value) or value < 1:
        raise ValueError(text)
    return int(value)


def main(argv: list[str]) -> int:
    """Prints the plan.

    Raises:
        UserError: Bad arguments, a plan that so many ranks cannot have, or one that does not fit ``--memory``.
    """
    parser = Parser(prog="gr-plan", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    _number.__name__ = "number"
    parser.add_argument("config", help="the run's YAML file; --field value overrides it")
    parser.add_argument("--world-size", type=_number, required=True, help="ranks")
    parser.add_argument("--local-world-size", type=_number, help="ranks on a machine")
    parser.add_argument("--memory", help="of a rank, for instance 80GB: refuses a plan that does not fit")
    parser.add_argument("--num-items", type=_number, help="of a log that is not at hand, for instance 3e9")
    parser.add_argument("--num-actions", type=_number, help="kinds of action, likewise")
    options, overrides = parser.parse_known_args(argv)
    memory = None if options.memory is None else parse_bytes(options.memory)
    world, local = options.world_size, options.local_world_size or options.world_size
    if world % local and local < world:
        raise UserError(f"--local-world-size {local}: must divide --world-size {world}")
    config = load_config([options.config, *overrides])
    batch = config.train.batching.batch_size
    if 0 < batch < world:
        raise UserError(f"train.batching.batch_size is {batch}; it must be at least the number of ranks, {world}")
    specs, dense = specs_of(config, options.num_items, options.num_actions)
    if memory is not None:
        check_fits(config, specs, dense, world, memory)
    tables = config.distributed.tables
    plans = plan_tables(specs, tables, world)
    print("\n".join(lines(plans, tables, count(config, plans, dense, world), world, local)))
    return 0


def cli() -> int:
    """Entry point of ``gr-plan``."""
    return run_cli(main)


if __name__ == "__main__":
    sys.exit(cli())
