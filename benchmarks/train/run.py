"""Training-step time of the quick-start's variants, as ratios measured alternately in one run.

    python -m benchmarks.train.run [--repeats 7] [--steps 20] [--providers hstu sasrec] [--json out.jsonl]

Every repeat times ``--steps`` steps of each provider in turn (same batches), so that a machine that slows down slows
all of them. What is compared with the first provider is the ratio within a repeat: median, smallest and largest. On a
CPU absolute figures mean little and none is printed. Excluded: reading data, evaluation, saving.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.train.quality import VARIANTS
from benchmarks.written import ROOT, append_row
from gr import config as configs
from gr.distributed.engine import Engine
from gr.distributed.process import ProcessContext
from gr.training.assemble import assemble, open_data, train_loader
from gr.training.environment import describe
from gr.training.optimizer import make_optimizer
from gr.training.phase import Phase, StepContext
from gr.training.run_config import RunConfig
from gr.training.step import run_step

SMALL = ["--data.num_users", "4000"]  # enough for the batches timed; the law, and so the shapes, are the quick start's
PROVIDERS: dict[str, list[str]] = {name: overrides for name, (_, overrides) in VARIANTS.items()} | {
    "hstu_bf16": ["--train.precision", "bf16"],
    "hstu_paper_loss": ["--objective.kind", "sampled_softmax", "--objective.num_negatives", "128"],
}


def stepper(overrides: list[str], cache: str) -> Callable[[int], None]:
    """A function that trains step number n of a provider."""
    config = configs.load(RunConfig, ROOT / "configs" / "quickstart.yaml", [*overrides, *SMALL, "--cache", cache])
    store, split = open_data(config)
    ctx = ProcessContext()
    model = assemble(config, store, split).train()
    loader = train_loader(config, store, split, ctx)
    dense, tables = model.dense_parameters(), model.table_parameters()
    engine = Engine(model, make_optimizer(dense, tables, config.train.optimizer), dense, ctx)
    phase, count = Phase(), loader.num_batches(0)

    def step(number: int) -> None:
        batch = loader.batch(0, number % count, number)
        context = StepContext(step=number, seed=0)
        bf16 = config.train.precision == "bf16"
        run_step(engine, phase, [batch], 1, context, ctx, bf16=bf16)

    return step


def measure(names: list[str], repeats: int, steps: int) -> list[dict[str, Any]]:
    """One row a provider: ratio of its time to the first provider's."""
    with tempfile.TemporaryDirectory() as cache:
        steppers = {name: stepper(PROVIDERS[name], cache) for name in names}
    for step in steppers.values():
        step(0)  # warm-up: allocations, thread pools
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name, step in steppers.items():
            begin = time.perf_counter()
            for number in range(steps):
                step(1 + repeat * steps + number)
            seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name in names:
        ratios = [own / first for own, first in zip(seconds[name], seconds[names[0]], strict=True)]
        spread = {"low": min(ratios), "median": statistics.median(ratios), "high": max(ratios)}
        rows.append({"provider": name, "baseline": names[0], "repeats": repeats, "steps": steps, **spread})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--json", type=Path, help="append the rows here")
    arguments = parser.parse_args()
    environment = describe(["benchmarks.train.run"])
    print(f"{environment['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'provider':<18}time of a step relative to {arguments.providers[0]}: median (smallest to largest)")
    for row in measure(arguments.providers, arguments.repeats, arguments.steps):
        print(f"{row['provider']:<18}{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
        if arguments.json:
            append_row(arguments.json, {**row, **{k: environment.get(k) for k in ("cpu", "torch", "git_commit")}})


if __name__ == "__main__":
    main()
