"""Trains on a prepared log that is larger than the memory that each rank may have.

    python -m benchmarks.data.larger_than_memory --work FOLDER [--events 100000000] [--limit-gib 1] [--steps 300]

A seeded store is written below ``--work`` (16 bytes an event) and its files are taken out of the page cache. Then two
ranks train on it, each of which limits its own memory (``RLIMIT_DATA``: what it may write to, which pages of mapped
files are not; the system refuses more). As a control the columns are copied into memory, and that must fail. Within a
memory cgroup the page cache is limited too; the row tells that limit. It goes to
``benchmarks/results/larger_than_memory_<date>.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.memory import memory
from benchmarks.written import append_row, dated
from gr import config as configs
from gr.data.split import make_split
from gr.data.store import Chunk, read_store, write_store
from gr.distributed.process import process
from gr.evaluation.metrics import means
from gr.recipes.retrieval import rank as rank_targets_together
from gr.training.assemble import assemble, sample_targets, train_loader
from gr.training.environment import describe
from gr.training.phase import Phase
from gr.training.run_config import RunConfig
from gr.training.trainer import Trainer

CHUNK_USERS = 20_000
PEAKS = {"data": "VmData", "anon": "RssAnon", "file": "RssFile"}
"""Watched figures: ``data`` is what the limit is on, ``anon`` what of it is used."""
TARGETS = 200
"""Validation targets ranked among all items at the end."""
CONFIG: dict[str, Any] = {
    "layout": {"max_events": 20},
    "model": {
        "dim": 8, "encoder": {"kind": "hstu", "num_layers": 1, "num_heads": 1, "dim_qk": 8, "dim_v": 8},
    },
    "objective": {"kind": "sampled_softmax", "num_negatives": 8, "sampler": "popularity"},
    "train": {"batching": {"batch_size": 32}, "log_every_steps": 1, "tensorboard": False},
    "distributed": {"tables": {"kind": "sharded", "optimizer": {"kind": "rowwise_adagrad"}}},
}  # fmt: skip


def main() -> None:
    """Runs the measurement once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the store, on a large disk")
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--limit-gib", type=float, default=1.0, help="of each rank")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to append the row")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--copied", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker is not None:
        worker(a.store, a.work, a.worker, a.world, a.steps, int(a.limit_gib * 2**30), a.copied)
        return
    environment = describe()
    a.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.work) as work:
        store = write_large_store(Path(work) / "store", a.events, a.users, a.items)
        found = measure(store, a.limit_gib, a.world, a.steps)
    sizes = {name: getattr(a, name) for name in ("events", "users", "items")}
    row = {"measurement": "larger_than_memory", **sizes, **found, "environment": environment}
    append_row(a.json or dated("larger_than_memory", "jsonl"), row)
    print(json.dumps(row, indent=1))


def write_large_store(folder: Path, events: int, users: int, items: int) -> Path:
    """A prepared log: users of like activity, popularity that falls as 1 / rank."""
    rng = np.random.default_rng(1)

    def chunks() -> Iterator[Chunk]:
        for first in range(0, users, CHUNK_USERS):
            count = min(CHUNK_USERS, users - first)
            offsets = np.concatenate([[0], np.cumsum(rng.integers(2 * mean // 3, 4 * mean // 3 + 1, count))])
            size = int(offsets[-1])
            item = np.minimum(np.exp(rng.random(size, np.float32) * np.log(items)), items - 1).astype(np.int64)
            time = 1_600_000_000 + np.cumsum(rng.integers(0, 60, size))
            yield Chunk(pa.array(np.arange(first, first + count)), offsets, {"item_id": item, "timestamp": time})

    mean = events // users
    ids = pa.array(np.arange(items))
    table = pa.table({"item_id": ids, "title": ids.cast(pa.string())})
    return write_store(folder, chunks(), table, {"source": "generated"})


def measure(store: Path, limit_gib: float, world: int, steps: int) -> dict[str, Any]:
    """Both runs on a store; the second is the control."""
    columns = sum(path.stat().st_size for path in store.glob("*.npy"))
    assert columns > limit_gib * 2**30, f"the log's columns have {columns / 2**30:.2f} GiB, which is within the limit"
    with tempfile.TemporaryDirectory() as work:
        forget(store)
        ranks, seconds = run(store, Path(work) / "mapped", limit_gib, world, steps, copied=False)
        assert all(rank["status"] == 0 for rank in ranks), ranks
        control, _ = run(store, Path(work) / "copied", limit_gib, world, 1, copied=True)
        assert all(rank["status"] for rank in control), "the copied log fits the limit: nothing is shown"
    return {
        "limit_gib": limit_gib,
        "columns_gib": round(columns / 2**30, 3),
        "world": world,
        "steps": steps,
        "seconds": seconds,
        "ranks": ranks,
        "copied_into_memory": [rank["error"] for rank in control],
        "cgroup_limit_gib": cgroup_limit_gib(),
    }


def forget(store: Path) -> None:
    """Takes a store's files out of the page cache."""
    for path in store.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(
    store: Path, work: Path, limit_gib: float, world: int, steps: int, copied: bool
) -> tuple[list[dict[str, Any]], float]:
    """What each rank says at its end, with ``status``, ``error`` and the most memory it was seen with; and seconds."""
    work.mkdir()
    words = ["--world", str(world), "--steps", str(steps), "--limit-gib", str(limit_gib), "--work", str(work)]
    command = [sys.executable, "-m", "benchmarks.data.larger_than_memory", "--store", str(store), *words]
    command += ["--copied"] * copied
    begin = time.perf_counter()
    errors = [(work / f"rank-{rank}.err").open("w+") for rank in range(world)]
    ranks = [
        subprocess.Popen([*command, "--worker", str(rank)], stdout=subprocess.DEVNULL, stderr=errors[rank],
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
        for rank in range(world)
    ]  # fmt: skip
    peaks: list[dict[str, int]] = [{} for _ in ranks]
    while any(rank.poll() is None for rank in ranks):
        for rank, peak in zip(ranks, peaks, strict=True):
            seen = memory(rank.pid)
            for name, figure in PEAKS.items():
                peak[name] = max(seen.get(figure, 0), peak.get(name, 0))
        if any(rank.poll() for rank in ranks):  # the others would wait for it
            for rank in ranks:
                rank.terminate()
        time.sleep(0.1)
    found = []
    for rank, peak in enumerate(peaks):
        errors[rank].seek(0)
        lines = [line.strip() for line in errors[rank] if line.strip()] or ["ended with the other"]
        errors[rank].close()
        status = ranks[rank].returncode
        told = {"error": lines[-1]} if status else json.loads((work / f"rank-{rank}.json").read_text())
        most = {f"peak_{name}_gib": round(value / 2**30, 3) for name, value in peak.items()}
        found.append({"status": status, **told, **most})
    return found, round(time.perf_counter() - begin, 1)


def worker(store: Path, work: Path, rank: int, world: int, steps: int, limit: int, copied: bool) -> None:
    """One rank."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    begin = time.perf_counter()
    log = read_store(store)
    opened = time.perf_counter() - begin
    if copied:
        log = dataclasses.replace(log, columns={name: np.array(values) for name, values in log.columns.items()})
    raw = {**CONFIG, "train": {**CONFIG["train"], "max_steps": steps}}
    config = configs.from_dict(RunConfig, raw, "the measurement")
    split = make_split(config.split, log)
    with process("cpu", init_method=f"file://{work}/meet", rank=rank, world=world) as ctx:
        model = assemble(config, log, split, ctx)
        loader = train_loader(config, log, split, ctx)
        trainer = Trainer(model, [Phase()], loader, None, config.train, ctx, work / "run", config.seed)
        result = trainer.fit()
        targets = sample_targets(split.valid, TARGETS)
        ranks = rank_targets_together(config, ctx, log, targets, model)
    used = resource.getrusage(resource.RUSAGE_SELF)
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    told = {
        "read_seconds": round(opened, 2),
        "seconds_a_step": round(result.seconds / steps, 4),
        "losses": hashlib.sha256(repr(losses).encode()).hexdigest()[:12],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "major_faults": used.ru_majflt,
        "validation": means(ranks, (10,)),
    }
    (work / f"rank-{rank}.json").write_text(json.dumps(told))


def cgroup_limit_gib() -> float | None:
    """Limit of the memory cgroup that this process is in, file pages included; ``None``: none, or not found."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        name = {"memory": f"memory{path}/memory.limit_in_bytes", "": f"{path}/memory.max"}.get(kinds)
        limit = Path("/sys/fs/cgroup", name.lstrip("/")) if name else None
        if limit is not None and limit.exists():
            value = limit.read_text().strip()
            return round(int(value) / 2**30, 3) if value.isdigit() and int(value) < 2**60 else None
    return None


if __name__ == "__main__":
    main()
