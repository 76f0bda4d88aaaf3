"""What dealing sequences to ranks by predicted cost is worth: every rank's step really run and timed, one by one.

    python -m benchmarks.train.balance [--settings 8x2048 16x1024] [--steps 8] [--repeats 5]

A log whose users' lengths are drawn from Zipf's law (P(n) ~ n^-1.2, cut to the longest, as NVIDIA's recsys-examples
draws them) is read by the trainer's own loader for 8 ranks. A step of synchronous training takes as long as its slowest
rank; so for every global batch each rank's forward and backward pass is timed alone, twice, of which the faster is
kept, and the slowest rank counts. Three dealings of the same global batches:

- plain: the shuffled batch cut into 8 equal numbers of sequences, in order, as a distributed sampler deals;
- equal tokens: longest first to the rank with the fewest tokens;
- balanced: what ``gr-train`` does, the same by predicted cost (``gr.data.loader``).

Dealings take turns within each step, in changing order, and every repeat has global batches of its own. Excluded:
making batches, drawing negatives, the update (which costs every rank the same) and communication. One thread. Ratios
are of sums over steps, median and range over repeats, by the clock and by the processor's own time, which other work on
the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.kernels.lengths import ZETA, ZIPF_ALPHA
from benchmarks.written import write_page
from gr import config as configs
from gr.data.batch import JaggedBatch
from gr.data.loader import PAIRS_PER_TOKEN, TrainLoader, deal, predicted_cost
from gr.data.negatives import make_sampler
from gr.models.retrieval import RetrievalModel
from gr.training.assemble import assemble, open_data
from gr.training.run_config import RunConfig
from gr.training.step import seed_step

WORLD = 8
NUM_ITEMS = 2000
BASE = "plain"
PREDICTED = ((8, 4096), (32, 1024), (32, 4096), (64, 4096))


class Plain(TrainLoader):
    """Equal numbers of sequences, as they come; the order of a global batch is random already."""

    def share(self, users: np.ndarray) -> list[np.ndarray]:
        """Consecutive parts."""
        return np.array_split(np.arange(users.size), self.world)


class EqualTokens(TrainLoader):
    """Nearly equal numbers of tokens."""

    def share(self, users: np.ndarray) -> list[np.ndarray]:
        """Longest first to the rank with the fewest."""
        return deal(self._tokens(users), self.world)


DEALINGS: dict[str, type[TrainLoader]] = {BASE: Plain, "equal tokens": EqualTokens, "balanced": TrainLoader}


def draw_lengths(rng: np.random.Generator, shape: Any, longest: int) -> np.ndarray:
    """int64 lengths of Zipf's law, cut to the longest."""
    mass = np.cumsum(np.arange(1, longest) ** -ZIPF_ALPHA) / ZETA
    return np.searchsorted(mass, rng.random(shape)) + 1


def write_log(path: Path, users: int, longest: int, seed: int) -> None:
    """Events whose training rows have Zipf lengths (a row is two events shorter than its user's log)."""
    rng = np.random.default_rng(seed)
    events = draw_lengths(rng, users, longest) + 2
    user = np.repeat(np.arange(users), events)
    place = np.arange(user.size) - np.repeat(np.cumsum(events) - events, events)
    columns = {"user_id": user, "item_id": rng.integers(NUM_ITEMS, size=user.size), "timestamp": 1000 + 60 * place}
    pq.write_table(pa.table(columns), path)


def run_config(folder: Path, per_rank: int, longest: int) -> RunConfig:
    """HSTU of the paper's form, wider and with two heads; its sampled softmax."""
    raw = {
        "data": {"kind": "table", "path": str(folder / "log.parquet")},
        "split": {"kind": "paper"},
        "layout": {"kind": "items", "max_events": longest},
        "model": {
            "dim": 64,
            "encoder": {"kind": "hstu", "preset": "paper", "num_layers": 2, "num_heads": 2, "dim_qk": 32, "dim_v": 32},
        },
        "objective": {"kind": "sampled_softmax", "num_negatives": 128},
        "train": {"batching": {"batch_size": per_rank * WORLD}},
        "cache": str(folder / "cache"),
    }
    return configs.from_dict(RunConfig, raw, "balance")


def timed(model: RetrievalModel, batch: JaggedBatch, step: int, rank: int) -> tuple[float, float]:
    """(clock, processor) seconds of a rank's forward and backward."""
    seed_step(0, step, rank)
    model.zero_grad(set_to_none=True)
    clock, processor = time.perf_counter(), time.process_time()
    model(batch).total.backward()
    return time.perf_counter() - clock, time.process_time() - processor


def best(model: RetrievalModel, batch: JaggedBatch, step: int, rank: int) -> np.ndarray:
    """(2,) the smaller of two timings, by each clock: what other programs do to one of them is not the batch's."""
    return np.min([timed(model, batch, step, rank) for _ in range(2)], axis=0)


def measure(folder: Path, per_rank: int, longest: int, steps: int, repeats: int) -> dict[str, Any]:
    """Ratios plain / other dealing, and what a token costs in pairs by these timings."""
    users = per_rank * WORLD * steps * repeats
    write_log(folder / "log.parquet", users, longest, seed=per_rank)
    config = run_config(folder, per_rank, longest)
    store, split = open_data(config)
    sampler = make_sampler(config.objective.negatives(), store, split)
    model = assemble(config, store, split).train()
    common = (store, split, config.layout, config.train.batching, sampler, config.seed)
    loaders = {name: [kind(*common, rank=r, world=WORLD) for r in range(WORLD)] for name, kind in DEALINGS.items()}
    seen: list[tuple[float, int, int]] = []
    sums = {name: np.zeros((repeats, 2)) for name in DEALINGS}
    predicted = dict.fromkeys(DEALINGS, 0)
    turns = 0
    for repeat in range(repeats):
        for step in range(steps):
            names = np.roll(list(DEALINGS), turns).tolist()
            turns += 1
            for name in names:
                batches = [loader.batch(0, repeat * steps + step) for loader in loaders[name]]
                costs = [model.step_cost(batch) for batch in batches]
                if turns == 1:  # warm-up: allocations
                    timed(model, max(batches, key=lambda batch: batch.num_tokens), 0, 0)
                times = np.array([best(model, batch, step, rank) for rank, batch in enumerate(batches)])
                sums[name][repeat] += times.max(0)
                seen += [(float(t[1]), c.tokens, c.pairs) for t, c in zip(times, costs, strict=True)]
                predicted[name] += max(predicted_cost(c.tokens, c.pairs) for c in costs)
    measured = np.array(seen)
    # Seconds = fixed + token * tokens + pair * pairs, each rank's step with the same relative error.
    design = np.column_stack([np.ones(len(measured)), measured[:, 1], measured[:, 2]]) / measured[:, :1]
    fixed, token, pair = np.linalg.lstsq(design, np.ones(len(measured)), rcond=None)[0]
    others = [name for name in DEALINGS if name != BASE]
    ratios = {
        name: {kind: (sums[BASE][:, k] / sums[name][:, k]).tolist() for k, kind in enumerate(("clock", "processor"))}
        for name in others
    }
    return {
        "per_rank": per_rank,
        "tokens": int(measured[:, 1].sum() / repeats / len(DEALINGS)),
        "ratios": ratios,
        "predicted": {name: predicted[BASE] / predicted[name] for name in others},
        "pairs_per_token": token / pair,
        "fixed_in_tokens": fixed / token,
        "users": users,
    }


def predict(per_rank: int, longest: int, batches: int = 200) -> str:
    """The same ratio by predicted cost alone, over many global batches."""
    tokens = draw_lengths(np.random.default_rng(0), (batches, WORLD, per_rank), longest)
    costs = predicted_cost(tokens, tokens * (tokens + 1) // 2)
    balanced = sum(max(flat[part].sum() for part in deal(flat, WORLD)) for flat in costs.reshape(batches, -1))
    return f"{costs.sum(2).max(1).sum() / balanced:.2f} by predicted cost alone, {batches} global batches, not timed"


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """All settings, one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=["8x2048", "16x1024"], help="sequences a rank x the longest")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, write no result")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        ("run", f"lengths of Zipf {ZIPF_ALPHA}; {WORLD} ranks; {a.repeats} repeats of {a.steps} global batches each"),
        ("model", "HSTU (paper), 2 layers, width 64, 2 heads, time and position bias, 128 sampled negatives, fp32"),
        ("figure", "sum over steps of the slowest rank's seconds, plain over the other dealing: median (range)"),
    ]
    for setting in a.settings:
        per_rank, longest = map(int, setting.split("x"))
        about = f"{per_rank} sequences a rank, longest {longest}"
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name), per_rank, longest, a.steps, a.repeats)
        print(json.dumps(found), flush=True)
        for dealing, by in found["ratios"].items():
            values = f"{spread(by['clock'])} by the clock, {spread(by['processor'])} by processor time"
            predicted = f"predicted {found['predicted'][dealing]:.2f}"
            rows.append((f"{about}: plain / {dealing}", f"{values}; {predicted}"))
        fitted = f"{found['pairs_per_token']:.0f} pairs, a step {found['fixed_in_tokens']:.0f} tokens"
        rows.append(
            (f"{per_rank} a rank: a token costs, by these times", f"{fitted} (the loader: {PAIRS_PER_TOKEN}, 0)")
        )
    for per_rank, longest in PREDICTED:
        rows.append((f"{per_rank} sequences a rank, longest {longest}: plain / balanced", predict(per_rank, longest)))
    given = f"--settings {' '.join(a.settings)} --steps {a.steps} --repeats {a.repeats}"
    if a.dry_run:
        print("\n".join(f"{name}: {value}" for name, value in rows))
    else:
        write_page("balance", f"python -m benchmarks.train.balance {given}", rows)


if __name__ == "__main__":
    main()
