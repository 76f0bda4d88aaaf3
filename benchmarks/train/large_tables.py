"""10 GB of tables in fp16, divided by rows between two CPU processes, trained in less than 16 GiB in all.

    python -m benchmarks.train.large_tables [--gigabytes 10] [--steps 60] [--optimizer rowwise_adagrad]      (Linux)

Two processes hold a table of fp16 rows of width 64 (torchrec, row-wise; row-wise Adagrad adds 4 bytes a row) and train
an HSTU on the generated world, its items spread evenly over all rows; negatives are drawn from all rows. Memory is
what Linux says: each process's own peak (VmHWM, pages shared with the other counted in both), and the sum of both
processes' proportional shares (PSS, shared pages counted once), looked at every 2 s. Excluded: saving. First rows are
drawn from a plain normal, block by block as ``gr.embedding.draw`` does, whose truncated one takes ten times as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.launch.common import environment
from benchmarks.memory import memory
from benchmarks.written import ROOT, write_page
from gr import config as configs
from gr.data.batch import JaggedBatch
from gr.data.negatives import NegativesConfig, Uniform
from gr.distributed import tables
from gr.distributed.process import ProcessContext, process
from gr.embedding.draw import Rows
from gr.embedding.spec import TableSpec
from gr.models.retrieval import RetrievalModel
from gr.training.assemble import open_data, train_loader
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer

DIM = 64
WORLD = 2
LIMIT_GIB = 16.0


class Spread:
    """A loader whose items are every ``stride``-th row of a large table, with negatives from all of its rows."""

    def __init__(self, loader: Any, num_rows: int, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.stride = num_rows // loader.store.num_items
        self.sampler = Uniform(NegativesConfig(kind="uniform", num=128, shared=True), num_rows)

    def num_batches(self, epoch: int) -> int:
        """As the loader."""
        return self.loader.num_batches(epoch)

    def batch(self, epoch: int, index: int, step: int) -> JaggedBatch:
        """The loader's, of larger item ids."""
        batch = self.loader.batch(epoch, index, step)
        labels = replace(batch.labels, item_id=batch.labels.item_id * self.stride)
        batch = batch.replace(tokens={**batch.tokens, "item_id": batch.tokens["item_id"] * self.stride}, labels=labels)
        return batch.replace(negatives=self.sampler(batch, self.seed, step, lambda: None))


def run_config(folder: Path, steps: int, optimizer: str) -> RunConfig:
    """The quick start's model and data, its tables sharded in fp16."""
    words = [
        *("--distributed.tables.kind", "sharded", "--distributed.tables.rows", "fp16"),
        *("--distributed.tables.optimizer.kind", optimizer, "--distributed.tables.optimizer.lr", "0.02"),
        *("--objective.kind", "sampled_softmax", "--objective.shared", "true", "--train.early_stopping", "null"),
        *("--train.max_steps", str(steps), "--train.log_every_steps", "1", "--train.tensorboard", "false"),
        *("--train.schedule.warmup_steps", "0", "--cache", str(folder / "cache"), "--device", "cpu"),
    ]
    return configs.load(RunConfig, ROOT / "configs" / "quickstart.yaml", words)


def quick_draw(spec: TableSpec) -> Rows:
    """As ``gr.embedding.draw.draw``, but from a normal that is not truncated, keyed by the first row asked for."""

    def rows(lo: int, hi: int) -> Tensor:
        generator = torch.Generator().manual_seed(lo)
        return torch.empty(hi - lo, spec.dim).normal_(0, spec.init_std, generator=generator)

    return rows


class Unsaved(Trainer):
    """Trains and writes metrics.jsonl, but no weights."""

    def _save(self, *_: Any) -> None:
        pass

    def _load_best(self) -> None:
        pass


def worker(folder: Path, num_rows: int, steps: int, optimizer: str, ctx: ProcessContext) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    config = run_config(folder, steps, optimizer)
    store, split = open_data(config)
    torch.manual_seed(0)
    tables.draw = quick_draw
    model = RetrievalModel(
        config.model,
        config.objective,
        num_items=num_rows,
        num_actions=0,
        layout=config.layout.kind,
        max_tokens=config.layout.max_tokens,
        make_tables=tables.make_tables(config.distributed.tables, ctx),
    )
    own = sum(s.tensor.nbytes for s in model.tables.saved(sums=False)["item/rows"].local_shards())
    loader = Spread(train_loader(config, store, split, ctx, negatives=False), num_rows, config.seed)
    begin = time.perf_counter()
    Unsaved(model, [Phase()], loader, None, config.train, ctx, folder / "run", config.seed).fit()
    (folder / f"rank-{ctx.rank}.json").write_text(
        json.dumps({"bytes": own, "seconds": time.perf_counter() - begin, "hwm": memory()["VmHWM"]})
    )


def watch(processes: list[subprocess.Popen[Any]]) -> float:
    """GiB: the largest sum of proportional shares, until the processes end."""
    peak = 0
    while any(p.poll() is None for p in processes):
        found = [memory(p.pid, shares=True).get("Pss", 0) for p in processes]
        peak = max(peak, sum(found))
        if peak > LIMIT_GIB * 2**30 or any(p.poll() for p in processes):
            break
        time.sleep(2)  # the kernel walks through all pages for it
    return peak / 2**30


def main() -> None:
    """Starts both, watches them, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of fp16 rows, 1e9 bytes each")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--optimizer", choices=("sgd", "rowwise_adagrad"), default="rowwise_adagrad")
    parser.add_argument("--dry-run", action="store_true", help="print, write no result")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # folder, rank
    a = parser.parse_args()
    num_rows = int(a.gigabytes * 1e9 / (2 * DIM))
    if a.worker:
        folder, rank = Path(a.worker[0]), int(a.worker[1])
        meeting = f"file://{folder}/rendezvous"
        with process("cpu", init_method=meeting, rank=rank, world=WORLD, timeout_s=1800) as ctx:
            worker(folder, num_rows, a.steps, a.optimizer, ctx)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        open_data(run_config(folder, a.steps, a.optimizer))  # prepared once
        command = [sys.executable, "-m", "benchmarks.train.large_tables", *sys.argv[1:], "--worker", name]
        processes = [subprocess.Popen([*command, str(r)], cwd=ROOT, env=environment()) for r in range(WORLD)]
        try:
            peak = watch(processes)
        finally:
            for p in processes:
                p.kill() if p.poll() is None else None
                p.wait()
        assert all(p.returncode == 0 for p in processes), f"status {[p.returncode for p in processes]}, peak {peak} GiB"
        ranks = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(WORLD)]
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    own = sum(r["hwm"] for r in ranks) / 2**30
    assert max(peak, own) < LIMIT_GIB and last < first, (peak, losses)
    rows = [
        (
            "tables",
            f"{sum(r['bytes'] for r in ranks) / 1e9:.2f} GB of fp16 rows ({num_rows:,} x {DIM}), divided by rows",
        ),
        ("trained", f"{len(losses)} steps, {a.optimizer}, fp32 gradients, gloo, two processes of one thread"),
        ("loss", f"{first:.3f} (mean of the first 5 steps) to {last:.3f} (of the last 5)"),
        ("peak of both", f"{peak:.2f} GiB (sum of PSS, every 2 s); limit {LIMIT_GIB:g} GiB"),
        ("each one's own peak", " + ".join(f"{r['hwm'] / 2**30:.2f}" for r in ranks) + f" = {own:.2f} GiB (VmHWM)"),
        ("time", f"{max(r['seconds'] for r in ranks):.0f} s of training, without drawing the rows"),
    ]
    if a.dry_run:
        print("\n".join(f"{name}: {value}" for name, value in rows))
    else:
        given = f"--gigabytes {a.gigabytes:g} --steps {a.steps} --optimizer {a.optimizer}"
        write_page("large_tables", f"python -m benchmarks.train.large_tables {given}", rows)


if __name__ == "__main__":
    main()
