"""From a design to runs: each cell becomes a whole config whose steps meet its budget, priced before it is run.

Costs are exact, not estimated: a loader's batches are a pure function of (seed, epoch), and FLOPs are linear in
tokens, pairs and labels, so the FLOPs of step 1, 2, ... are known before the first of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml

from gr import config as configs
from gr import flops
from gr.config import config_hash
from gr.data.layout import training_ranges
from gr.data.loader import BatchingConfig, TrainLoader
from gr.data.split import Split, Targets, thin
from gr.data.store import EventStore
from gr.distributed.process import ProcessContext
from gr.errors import UserError
from gr.files import write_text
from gr.scaling.cells import Cell
from gr.scaling.design import Study, Variant, find_base
from gr.scaling.recipe import Recipe, find_recipe
from gr.scaling.store import RunSpec, make_run_id
from gr.training.assemble import assemble, open_data, sample_targets, train_loader
from gr.training.run_config import RunConfig


@dataclass(frozen=True)
class Rejected:
    """A cell that is not run, and why."""

    variant: str
    cell: Cell
    seed: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Runs in the order of the design, and what was left out."""

    specs: list[RunSpec]
    rejected: list[Rejected]


@dataclass(frozen=True)
class Cost:
    """Forward FLOPs = per_token * tokens + per_pair * pairs + per_label * labels.

    Attributes:
        per_token, per_pair, per_label: Integers.
        parameters: Matrix parameters of the encoder.
    """

    per_token: int
    per_pair: int
    per_label: int
    parameters: int

    def training(self, tokens: float, pairs: float, labels: float) -> float:
        """Model FLOPs."""
        return flops.training_flops(self.per_token * tokens + self.per_pair * pairs + self.per_label * labels)


@dataclass
class Bench:
    """A variant with its data at hand."""

    name: str
    recipe: Recipe
    base: RunConfig
    store: EventStore
    split: Split  # with every training user
    known: dict[tuple[object, ...], tuple[Split, Rows, Cost]] = field(default_factory=dict)

    def data_hash(self) -> str:
        """Of the log."""
        return self.store.manifest["content_hash"]


def open_bench(study: Study, path: Path, name: str) -> Bench:
    """A variant's base config and log, prepared now if need be."""
    variant: Variant = study.variants[name]
    base = configs.load(RunConfig, find_base(variant.base, path), list(variant.overrides))
    train = dataclasses.replace(base.train, tensorboard=False)
    base = dataclasses.replace(base, cache=study.cache, device=study.device, train=train)
    store, split = open_data(dataclasses.replace(base, train_users=0))  # each cell thins it as its config says
    return Bench(name, find_recipe(variant.recipe), base, store, split)


def make_plan(study: Study, path: Path) -> Plan:
    """Every run of a study.

    Raises:
        UserError: A base config or a recipe that is missing or does not fit, or a design of which nothing is left.
    """
    specs: list[RunSpec] = []
    rejected: list[Rejected] = []
    cells = study.design.cells()
    smallest = min(_amount(cell) for cell in cells)
    for name in study.variants:
        bench = open_bench(study, path, name)
        for cell in cells:
            repeats = study.seeds.smallest_budget if _amount(cell) == smallest else study.seeds.default
            for seed in range(repeats):
                try:
                    spec = plan_run(study, bench, cell, seed)
                except _Unfit as unfit:
                    rejected.append(Rejected(name, cell, seed, str(unfit)))
                    continue
                twin = next((other for other in specs if other.run_id == spec.run_id), None)
                if twin is not None:
                    rejected.append(Rejected(name, cell, seed, f"the same run as {twin.title}"))
                else:
                    specs.append(spec)
    if not specs:
        raise UserError(f"{path}: no cell can be run; the first: {rejected[0].reason}")
    return Plan(specs, rejected)


def _amount(cell: Cell) -> float:
    """What a cell spends: FLOPs, or in a grid tokens."""
    amount = cell.tokens if cell.budget is None else cell.budget
    assert amount is not None, "a cell says what it spends"
    return amount


class _Unfit(Exception):
    """A cell beyond the limits."""


def plan_run(study: Study, bench: Bench, cell: Cell, seed: int, limited: bool = True) -> RunSpec:
    """One run.

    Args:
        study: Limits and judging.
        bench: The variant.
        cell: The point of the design.
        seed: Of the run.
        limited: Whether a cell beyond the limits is refused.
    """
    config = dataclasses.replace(bench.recipe.apply(bench.base, cell), seed=seed)
    if cell.length is not None:
        config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, max_events=cell.length))
    if cell.users is not None:
        config = dataclasses.replace(config, train_users=cell.users)
    shape = (cell.scale, config.layout.max_events, cell.users)
    if shape not in bench.known:  # the same for every budget and seed
        split = thin(bench.split, config.train_users)
        rows = Rows(config, split, np.flatnonzero(split.train_stop >= 2))
        bench.known[shape] = split, rows, run_cost(config, bench.store, split)
    split, rows, cost = bench.known[shape]
    budget = cell.budget
    if budget is None:  # what its tokens cost on average
        epoch = cost.training(rows.tokens.sum(), rows.pairs.sum(), rows.labels.sum())
        budget = float(_amount(cell) * epoch / rows.tokens.sum())
    batch = bench.recipe.batch_size(budget, rows.tokens.mean(), rows.users.size)
    train = dataclasses.replace(config.train, batching=BatchingConfig(batch_size=batch), accumulate=1)
    config = dataclasses.replace(config, train=train)
    planned = solve(config, bench.store, split, rows, cost, budget)
    if limited:
        _check(study, budget, planned)
    config = bench.recipe.finish(config, int(planned["steps"]), math.ceil(planned["epochs"] - 1e-9))
    judging = {"users": study.judging.users, "ks": list(study.judging.ks)}
    data_hash = bench.data_hash()
    evaluated = eval_hash(config, split, study.judging.users, study.judging.ks, data_hash)
    run_id = make_run_id(config_hash(config), bench.recipe.name, data_hash, evaluated)
    return RunSpec(
        run_id=run_id,
        study=study.name,
        variant=bench.name,
        recipe=bench.recipe.name,
        scale=cell.scale,
        budget=budget,
        seed=seed,
        holdout=study.holdout.holds(cell),
        planned=planned,
        judging=judging,
        data_hash=data_hash,
        eval_hash=evaluated,
        config=configs.to_dict(config),
    )


def _check(study: Study, budget: float, planned: dict[str, float]) -> None:
    limits = study.limits
    if planned["steps"] < limits.min_steps:
        raise _Unfit(f"{planned['steps']:.0f} steps, fewer than limits.min_steps {limits.min_steps}")
    if planned["epochs"] > limits.max_epochs:
        raise _Unfit(f"{planned['epochs']:.1f} epochs, more than limits.max_epochs {limits.max_epochs:g}")
    off = planned["model_flops"] / budget - 1.0
    if abs(off) > limits.flop_tolerance:
        raise _Unfit(f"{100 * off:+.1f} % off its budget, more than limits.flop_tolerance {limits.flop_tolerance:g}")


class Rows:
    """Tokens, labels and pairs of each training user's row, (n,) int64 each, in the order of ``users``."""

    def __init__(self, config: RunConfig, split: Split, users: np.ndarray) -> None:
        start, stop = training_ranges(split, config.layout, users)
        self.users = users
        self.labels = stop - start
        self.tokens = self.labels * config.layout.tokens_per_event
        encoder = config.model.encoder
        window, tail = getattr(encoder, "window", None), getattr(encoder, "full_tail", None)
        lengths, place = np.unique(self.tokens, return_inverse=True)
        each = [flops.pairs([n], window=window, full_tail=tail if window else None) for n in lengths.tolist()]
        self.pairs = np.array(each, np.int64)[place]


def run_cost(config: RunConfig, store: EventStore, split: Split) -> Cost:
    """What a config costs, from the model itself; its weights are not allocated."""
    with torch.device("meta"):
        model = assemble(config, store, split)
    per_token = sum(model.encoder.forward_flops(1, 0).values())
    per_pair = sum(model.encoder.forward_flops(0, 1).values())
    batch = train_loader(config, store, split, ProcessContext()).batch(0, 0, 0)
    whole = model.step_cost(batch)
    head = whole.forward_flops - per_token * whole.tokens - per_pair * whole.pairs
    return Cost(per_token, per_pair, head // batch.labels.item_id.numel(), matrix_parameters(model.encoder))


def matrix_parameters(encoder: torch.nn.Module) -> int:
    """N of the laws: what its products multiply with."""
    return sum(p.numel() for p in encoder.parameters() if p.dim() >= 2)


def solve(
    config: RunConfig, store: EventStore, split: Split, rows: Rows, cost: Cost, budget: float
) -> dict[str, float]:
    """The number of steps whose model FLOPs come nearest to the budget, and what they read.

    Returns:
        ``steps``, ``tokens``, ``labels``, ``pairs``, ``model_flops`` (exact), ``epochs``, ``n_encoder``.
    """
    loader = TrainLoader(store, split, config.layout, config.train.batching, None, config.seed)
    one_epoch = cost.training(rows.tokens.sum(), rows.pairs.sum(), rows.labels.sum())
    whole = max(0, math.floor(budget / one_epoch))
    place = np.zeros(store.num_users, np.int64)
    place[rows.users] = np.arange(rows.users.size)
    sums = np.array([rows.tokens.sum(), rows.pairs.sum(), rows.labels.sum()]) * whole
    steps = sum(loader.num_batches(epoch) for epoch in range(whole))
    batches = loader.plan(whole)
    starts = np.cumsum([0, *(len(batch) for batch in batches[:-1])])
    order = place[np.concatenate(batches)]
    running = np.stack([np.cumsum(np.add.reduceat(x[order], starts)) for x in (rows.tokens, rows.pairs, rows.labels)])
    running = np.concatenate([np.zeros((3, 1), np.int64), running], axis=1) + sums[:, None]
    more = int(np.argmin(np.abs(cost.training(*running) - budget)))
    if steps + more == 0:
        more = 1
    tokens, pairs, labels = (int(x) for x in running[:, more])
    return {
        "steps": steps + more,
        "tokens": tokens,
        "labels": labels,
        "pairs": pairs,
        "model_flops": int(cost.training(tokens, pairs, labels)),
        "epochs": whole + more / len(batches),
        "n_encoder": cost.parameters,
    }


def judged_targets(split: Split, users: int) -> Targets:
    """The test targets that every run of a study is judged by."""
    return sample_targets(split.test, users)


def eval_hash(config: RunConfig, split: Split, users: int, ks: tuple[int, ...] | list[int], data_hash: str) -> str:
    """12 hex digits of what judging depends on: the log, the targets, the rule for seen items, the cut-offs."""
    targets = judged_targets(split, users)
    seen: list[object] = [config.evaluation.mask_seen]
    if config.evaluation.mask_seen == "window":  # what leaves the candidates depends on it
        seen.append(config.layout.max_events)
    digest = hashlib.sha256(json.dumps([data_hash, list(ks), *seen, "full ranking"]).encode())
    digest.update(targets.user.tobytes())
    digest.update(targets.position.tobytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=1)
def _device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def assumed_rate(study: Study) -> tuple[float | None, str]:
    """(model FLOP/s of a device before anything was measured, where that comes from)."""
    if study.flops_per_s is not None:
        return study.flops_per_s, "flops_per_s"
    peak = flops.device_peak_flops(_device_name()) if _device_name() else None
    return (None, "unknown: set flops_per_s") if peak is None else (0.3 * peak, "30 % of the device's peak")


def write_config(spec: RunSpec, path: Path) -> None:
    """The run as a config of ``gr-train``."""
    named = {**spec.config, "name": f"{spec.study}-{spec.variant}-{spec.run_id}"}
    about = f"# Written by gr-scaling predict: {spec.title}, recipe {spec.recipe}.\n"
    write_text(path, about + yaml.safe_dump(named, sort_keys=False))
