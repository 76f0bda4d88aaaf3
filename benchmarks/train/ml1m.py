"""Our training of the paper's ML-1M model against a plain padded form of it, alternately in one run.

    python -m benchmarks.train.ml1m --data ratings.parquet [--data.timestamp COLUMN ...] [--parts epoch losses ...]
        [--providers hstu hstu_bf16 plain plain_lean plain_gemm] [--repeats 5] [--steps 8] [--threads 2]
        [--allocator kept] [--json OUT.jsonl]

Every option with a dot changes a field of ``configs/ml-1m_hstu.yaml``, as in ``gr-train``. Dropout is 0 here, so that
all providers compute the same function; they get the same first weights, batches and negatives, the same AdamW and
``gr.training.step.run_step``.

Providers: ``hstu`` is our model as ``gr-train`` assembles it, ``hstu_bf16`` the same with matrix products in bfloat16;
``plain``, ``plain_lean`` and ``plain_gemm`` are the padded forms of :mod:`benchmarks.train.plain`.

Parts, one JSON line for each of ours against each plain one:

- ``epoch``: whole epochs, or with ``--steps`` an even sample of an epoch's steps. Ratio plain / ours of each repeat,
  and where each one's time goes. Making the batch (with its negatives) is included, in the main thread; ``gr-train``
  makes it ahead in a thread of its own. Excluded: preparing data, first weights, two warm-up steps, saving, evaluation.
- ``losses``: both train on the same batches from the same weights; the largest relative difference of a step's loss.
- ``evaluation``: every test target among all items. Included: making batches, masks, normalising the item table.
- ``memory``: peak resident memory of a fresh process that reads the prepared data and trains an epoch (``--steps``: a
  sample), GiB, with what it held before the first step.

A ratio above 1 means that ours is faster. On a CPU seconds mean little, so none is printed. ``--allocator kept`` makes
glibc keep what is freed (``KEPT``) for all providers alike. Where a page fault is dear, as in a virtual machine, giving
large tensors back and asking again costs more than all arithmetic, and most in the plain form, whose tensors are the
largest: a ratio under the default allocator is in part one of page faults. Look at both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.allocator import KEPT
from benchmarks.memory import peak_gib
from benchmarks.train.plain import FORMS, PlainHSTU, rank_padded
from benchmarks.written import ROOT, append_row
from gr import config as configs
from gr.data.batch import JaggedBatch
from gr.data.loader import TrainLoader
from gr.data.split import Split
from gr.data.store import EventStore
from gr.distributed.engine import Engine
from gr.distributed.process import ProcessContext
from gr.evaluation.metrics import hit_rate
from gr.evaluation.ranking import rank_targets
from gr.training.assemble import assemble, eval_loader, open_data, sample_targets, train_loader
from gr.training.environment import describe
from gr.training.optimizer import make_optimizer
from gr.training.phase import Phase, StepContext
from gr.training.run_config import RunConfig
from gr.training.step import StepResult, run_step

CONFIG = ROOT / "configs" / "ml-1m_hstu.yaml"
# A table of ratings at hand in place of the download; both forms leave all earlier items of a user out of the ranking.
TABLE = ["--data", '{"kind": "table", "path": "", "timestamp": "timestamp"}', "--evaluation.mask_seen", "true"]
EXACT = ["--model.encoder.dropout", "0", "--model.preprocessor.dropout", "0", "--train.precision", "fp32"]
OURS = ("hstu", "hstu_bf16")
PLAIN = FORMS
PARTS = ("epoch", "losses", "evaluation", "memory")
LOSS_LIMIT = 1e-3
HIT_LIMIT = 1e-3
WARM_UP = 2


class Learner:
    """A provider that trains, and knows where its time went.

    Attributes:
        seconds: Of ``loader``, ``forward``, ``backward`` (with the division by the weight) and ``optimizer``, since
            ``reset``.
    """

    def __init__(self, name: str, config: RunConfig, store: EventStore, split: Split) -> None:
        ours = assemble(config, store, split)
        self.name, self.config = name, config
        self.model = PlainHSTU(ours, name) if name in PLAIN else ours
        self.model.train()
        if config.train.compile and name in OURS:
            self.model.compile(dynamic=True)
        dense = self.model.dense_parameters()
        optimizer = make_optimizer(dense, self.model.table_parameters(), config.train.optimizer)
        optimizer.register_step_pre_hook(lambda *_: self._mark("backward"))
        optimizer.register_step_post_hook(lambda *_: self._mark("optimizer"))
        self.phase, self.ctx = Phase(objective=self._objective), ProcessContext()
        self.engine = Engine(self.model, optimizer, dense, self.ctx, clip_norm=config.train.clip_norm)
        self.reset()

    def reset(self) -> None:
        """Sets the clocks to zero."""
        self.seconds = dict.fromkeys(("loader", "forward", "backward", "optimizer"), 0.0)
        self._last = time.perf_counter()

    def train(self, make: Callable[[], JaggedBatch], number: int) -> StepResult:
        """Makes a batch and learns from it."""
        self._last = time.perf_counter()
        batch = make()
        self._mark("loader")
        return run_step(
            self.engine,
            self.phase,
            [batch],
            1,
            StepContext(step=number, seed=self.config.seed),
            self.ctx,
            bf16=self.name == "hstu_bf16",
            step_cost=getattr(self.model, "step_cost", None),  # the trainer counts too
        )

    def _objective(self, model: torch.nn.Module, batch: JaggedBatch, _: StepContext) -> Any:
        losses = model(batch)
        self._mark("forward")
        return losses

    def _mark(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


class Bench:
    """The data, once, and the measurements over it."""

    def __init__(self, config: RunConfig, names: Sequence[str]) -> None:
        self.config = config
        self.ours = [name for name in names if name in OURS]
        self.plain = [name for name in names if name in PLAIN]
        self.store, self.split = open_data(config)
        self.loader: TrainLoader = train_loader(config, self.store, self.split, ProcessContext())

    def learner(self, name: str) -> Learner:
        """A provider with the first weights."""
        return Learner(name, self.config, self.store, self.split)

    def epoch(self, repeats: int, steps: int) -> list[dict[str, Any]]:
        """Time of training, alternately."""
        learners = [self.learner(name) for name in (*self.ours, *self.plain)]
        for learner in learners:
            for number in range(WARM_UP):
                learner.train(lambda number=number: self.loader.batch(0, number % self.loader.num_batches(0)), number)
            learner.reset()
        seconds: dict[str, list[float]] = {learner.name: [] for learner in learners}
        for repeat in range(repeats):
            indices = self._timed(repeat, steps)
            self.loader.plan(repeat)  # kept by the loader: otherwise the first provider would pay for all
            for learner in learners:
                begin = time.perf_counter()
                train(learner, self.loader, repeat, indices)
                seconds[learner.name].append(time.perf_counter() - begin)
        parts = {learner.name: learner.seconds for learner in learners}
        rows = []
        for own, other in self._pairs():
            shares = {
                name: {part: round(spent / sum(seconds[name]), 3) for part, spent in parts[name].items()}
                for name in (own, other)
            }
            part_ratios = {part: round(parts[other][part] / parts[own][part], 3) for part in parts[own]}
            rows.append(
                {
                    "measurement": "epoch",
                    "provider": own,
                    "baseline": other,
                    **ratios(seconds[other], seconds[own]),
                    "steps": len(self._timed(0, steps)),
                    "steps_of_an_epoch": self.loader.num_batches(0),
                    "shares": shares,
                    "part_ratios": part_ratios,
                    "includes": "making batches and negatives, in the main thread",
                    "excludes": f"preparing data, first weights, {WARM_UP} warm-up steps, saving, evaluation",
                }
            )
        return rows

    def losses(self, steps: int) -> list[dict[str, Any]]:
        """The same losses from the same weights and batches; bf16 is compared but not judged."""
        learners = {name: self.learner(name) for name in (*self.ours, *self.plain)}
        seen: dict[str, list[float]] = {name: [] for name in learners}
        count = self.loader.num_batches(0)
        for number in range(steps):
            batch = self.loader.batch(number // count, number % count, number)
            for name, learner in learners.items():
                total, weight = learner.train(lambda batch=batch: batch, number).sums[:2].tolist()
                seen[name].append(total / weight)
        rows = []
        for own, other in self._pairs():
            mine, theirs = np.array(seen[own]), np.array(seen[other])
            apart = np.abs(mine - theirs) / np.abs(theirs)
            row = {
                "measurement": "losses",
                "provider": own,
                "baseline": other,
                "steps": steps,
                "largest_relative_difference": float(apart.max()),
                "at_step": int(apart.argmax()),
                "at_first_step": float(apart[0]),
                "first_loss": float(mine[0]),
                "last_loss": float(mine[-1]),
            }
            if own == "hstu":
                row |= {"limit": LOSS_LIMIT, "passed": bool(apart.max() <= LOSS_LIMIT)}
            rows.append(row)
        return rows

    def evaluation(self, repeats: int, trained: int, users: int) -> list[dict[str, Any]]:
        """Time of ranking every test target, alternately, with weights that ours has after ``trained`` steps."""
        if "hstu" not in self.ours:
            return []
        learner = self.learner("hstu")
        count = self.loader.num_batches(0)
        for number in range(trained):
            learner.train(lambda n=number: self.loader.batch(n // count, n % count, n), number)
        ours = learner.model.eval()
        targets = sample_targets(self.split.test, users)
        loader = eval_loader(self.config, self.store, targets, ProcessContext())
        masked = self.config.evaluation.mask_seen
        runs: dict[str, Callable[[], Any]] = {"hstu": lambda: rank_targets(ours, loader, masked)}
        for name in self.plain:
            if name == "plain_gemm":
                continue  # a loss; it ranks as plain_lean does
            model, lean = PlainHSTU(ours, name).eval(), name == "plain_lean"
            runs[name] = lambda model=model, lean=lean: rank_padded(model, loader, masked, by_count=lean)
        ranked = {name: run() for name, run in runs.items()}  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        hits = {name: ranks <= 10 if name in PLAIN else hit_rate(ranks, 10) for name, ranks in ranked.items()}
        rates = {name: float(np.mean(values)) for name, values in hits.items()}
        return [
            {
                "measurement": "evaluation",
                "provider": "hstu",
                "baseline": name,
                **ratios(seconds[name], seconds["hstu"]),
                "targets": len(targets),
                "items": self.store.num_items,
                "after_steps": trained,
                "hr@10": {"hstu": rates["hstu"], name: rates[name]},
                "hits_that_differ": int((hits["hstu"] != hits[name]).sum()),
                "limit": HIT_LIMIT,
                "passed": abs(rates["hstu"] - rates[name]) <= HIT_LIMIT,
                "includes": "making batches, masks of seen items, normalising the item table",
                "excludes": "preparing data, the first pass",
            }
            for name in runs
            if name != "hstu"
        ]

    def memory(self, name: str, steps: int) -> dict[str, float]:
        """Peak memory of this very process, which trains an epoch; for a fresh process only."""
        learner = self.learner(name)
        before = peak_gib()
        train(learner, self.loader, 0, sample(self.loader.num_batches(0), steps))
        return {"peak_gib": round(peak_gib(), 3), "before_training_gib": round(before, 3)}

    def _timed(self, epoch: int, steps: int) -> list[int]:
        """All steps of an epoch, or an even sample of those with a full batch: the last one, short, counts once in an
        epoch and would count far more in a sample."""
        count = self.loader.num_batches(epoch)
        return sample(count if steps == 0 else max(count - 1, 1), steps)

    def _pairs(self) -> list[tuple[str, str]]:
        return [(own, other) for own in self.ours for other in self.plain]


def train(learner: Learner, loader: TrainLoader, epoch: int, indices: Sequence[int]) -> None:
    """Some steps of an epoch."""
    count = loader.num_batches(epoch)
    for index in indices:
        number = epoch * count + index
        learner.train(lambda index=index, number=number: loader.batch(epoch, index, number), number)


def sample(count: int, steps: int) -> list[int]:
    """An even sample of ``range(count)``, all of it if ``steps`` is 0."""
    if steps == 0 or steps >= count:
        return list(range(count))
    return np.linspace(0, count - 1, steps).round().astype(int).tolist()


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of the repeats' ratios."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "ratio": {"median": statistics.median(each), "low": min(each), "high": max(each)},
        "ratios": [round(ratio, 3) for ratio in each],
        "repeats": len(each),
    }


def memory_rows(names: Sequence[str], argv: Sequence[str], cache: str) -> list[dict[str, Any]]:
    """One fresh process a provider."""
    rows = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.train.ml1m", *argv, "--cache", cache, "--child", name]
        search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the process that measures the memory of {name} failed:\n{done.stderr[-2000:]}")
        rows.append({"measurement": "memory", "provider": name, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def say(row: dict[str, Any]) -> str:
    """A row for people."""
    against = f"{row['measurement']:<11}{row['provider']:<10}"
    if row["measurement"] == "memory":
        return f"{against} {row['peak_gib']:.2f} GiB at most, {row['before_training_gib']:.2f} before the first step"
    against += f" against {row['baseline']:<11}"
    if "ratio" in row:
        against += "{median:.2f}x ({low:.2f} to {high:.2f})".format(**row["ratio"])
    if row["measurement"] == "epoch":
        shares = (" ".join(f"{k} {v:.0%}" for k, v in row["shares"][n].items()) for n in row["shares"])
        against += "".join(f"\n    {name}: {found}" for name, found in zip(row["shares"], shares, strict=True))
    elif row["measurement"] == "losses":
        against += f"largest relative difference {row['largest_relative_difference']:.2e} of {row['steps']} losses"
    else:
        against += f"  HR@10 {row['hr@10']}, {row['hits_that_differ']} of {row['targets']} hits differ"
    return against + ("" if row.get("passed", True) else f"  ABOVE THE LIMIT {row['limit']}")


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known options, and overrides of the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="MovieLens-1M ratings as Parquet or CSV")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--providers", nargs="+", choices=OURS + PLAIN, default=list(OURS + PLAIN))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="steps of an epoch that are timed; 0: all")
    parser.add_argument("--loss-steps", type=int, default=200)
    parser.add_argument("--eval-after", type=int, default=48, help="steps trained before evaluation is timed")
    parser.add_argument("--eval-users", type=int, default=0, help="an even sample of the test targets; 0: all")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--allocator", choices=("default", "kept"), default="default")
    parser.add_argument("--cache", help="folder of prepared data; a temporary one if left out")
    parser.add_argument("--json", type=Path, help="append the rows here")
    parser.add_argument("--child", choices=OURS + PLAIN, help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options, overrides = arguments(argv)
    if options.allocator == "kept" and any(os.environ.get(name) != value for name, value in KEPT.items()):
        # glibc reads these when the process starts.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.train.ml1m", *argv], os.environ | KEPT)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or folder
        given = [*TABLE, "--data.path", options.data, *EXACT, *overrides, "--cache", cache, "--device", "cpu"]
        config = configs.load(RunConfig, CONFIG, given)
        bench = Bench(config, options.providers)
        if options.child:
            print(json.dumps(bench.memory(options.child, options.steps)))
            return 0
        environment = describe(["benchmarks.train.ml1m", *(Path(a).name if os.path.isabs(a) else a for a in argv)])
        common = {
            "config_hash": configs.config_hash(replace(config, data=replace(config.data, path=""))),
            "data": {k: bench.store.manifest.get(k) for k in ("source", "content_hash", "caveats")},
            "allocator": options.allocator,
            "environment": environment,
        }
        print(f"{environment['cpu']}, {environment['threads']} threads, torch {torch.__version__}")
        failed = False
        for part in options.parts:
            if part == "epoch":
                rows = bench.epoch(options.repeats, options.steps)
            elif part == "losses":
                rows = bench.losses(options.loss_steps)
            elif part == "evaluation":
                rows = bench.evaluation(options.repeats, options.eval_after, options.eval_users)
            else:
                rows = memory_rows([*bench.ours, *bench.plain], argv, cache)
                for row in rows:
                    row["steps"] = len(sample(bench.loader.num_batches(0), options.steps))
            for row in rows:
                failed |= not row.get("passed", True)
                print(say(row), flush=True)
                if options.json:
                    append_row(options.json, {**row, **common})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
