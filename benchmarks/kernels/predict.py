"""What an H100 could do with the attention rows that have a target, from counted work. Nothing here was measured.

    python -m benchmarks.kernels.predict [--out benchmarks/results/gpu_predicted_h100_YYYYMMDD.md]

Counted for each row, from the shapes, the mask and the tiles that the launcher takes on sm_90: pairs of visited tiles,
products of each kernel, bytes (every argument once, every result once), special-function instructions, and the
arithmetic and shared-memory accesses of a pair. Each is divided by what that unit of the device does at most. The time
lies between the longest of them (all units work at once) and their sum (one waits for the other). A target within the
two is possible; one above the first is out of reach of these kernels, however well they are scheduled. Not counted:
launches, the tail of the last wave, latency, bank conflicts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import check_folder, parser_of
from benchmarks.kernels.hstu_attention import OPERATOR, AttentionCase, cost, make
from benchmarks.kernels.lengths import lengths
from benchmarks.kernels.registry import Operator
from benchmarks.kernels.targets import ATTENTION, Target
from gr.errors import run_cli
from gr.kernels.hstu_attention import triton_tiles as tiles
from gr.kernels.hstu_attention import visible_pairs
from gr.kernels.hstu_attention.time_buckets import time_bucket
from gr.training.environment import describe

ARCHITECTURE = 90
SMS, CLOCK = 132, 1.755e9
RATES = {
    "memory": 3.0e12,  # bytes/s of a large copy, of 3.35e12 on paper
    "matrix": 790e12,  # FLOP/s of a large bfloat16 product, of 989e12 on paper: clocks fall under load
    "atomics": 2.7e12,  # bytes/s of float32 additions in the second-level cache: the least certain figure here
    "special": 16 * SMS * CLOCK,  # tanh, reciprocal
    "arithmetic": 128 * SMS * CLOCK,  # additions, products, comparisons, selections, conversions
    "shared": 32 * SMS * CLOCK,  # loads from the first-level cache, shared memory
}
"""What the device does of each a second."""
PRODUCTS = {"forward": (1, 1), "backward": (3, 2), "backward without dQ": (2, 2), "backward_query": (2, 1)}
"""Products of d_qk and of d_v multiply-adds a pair."""
ARITHMETIC = {"forward": 4, "backward": 10, "backward without dQ": 10, "backward_query": 7}
"""Of a pair without bias: scale, 1 + tanh, products, conversions; counted in the kernels' source."""
EDGE, EDGE_GRADIENT = 2, 4
"""Of a pair and an edge of time buckets inside its tile: a comparison and a selection; and its sum."""
TIME, POSITION, POSITION_GRADIENT = 3, 2, 4
"""Of a pair: the distance of times and its addition; a table's address and addition; turning and summing diagonals."""


@dataclass
class Work:
    """Counts of a call: bytes, FLOPs, bytes, and operations of single lanes."""

    memory: float = 0
    matrix: float = 0
    atomics: float = 0
    special: float = 0
    arithmetic: float = 0
    shared: float = 0

    def seconds(self) -> dict[str, float]:
        """Of each unit alone."""
        return {each.name: getattr(self, each.name) / RATES[each.name] for each in fields(self)}


@dataclass
class Prediction:
    """A case and direction.

    Attributes:
        work: What is done.
        pairs: Exact pairs, by which figures are counted.
        flops: By the peers' convention.
        kernels: By name, with the tile and the pairs that each visits, padding and hidden ones too, as a multiple of
            the exact pairs.
    """

    work: Work
    pairs: int
    flops: int
    kernels: dict[str, tuple[tiles.Tile, float]]

    def bounds(self) -> tuple[float, float]:
        """Seconds if all units work at once, and if none does."""
        spent = self.work.seconds().values()
        return max(spent), sum(spent)


def visited(seen: torch.Tensor, tile: tiles.Tile) -> np.ndarray:
    """``(query blocks, key blocks)`` bool: tiles of one row that hold a visible pair."""
    n = seen.shape[0]
    m, k = -(-n // tile.block_m), -(-n // tile.block_n)
    full = torch.zeros(m * tile.block_m, k * tile.block_n, dtype=torch.bool)
    full[:n, :n] = seen
    return full.view(m, tile.block_m, k, tile.block_n).any(3).any(1).numpy()


def edges_within(own: np.ndarray, following: np.ndarray, there: np.ndarray, tile: tiles.Tile) -> float:
    """Edges of time buckets inside the visited tiles of one row, summed; times rise."""
    n = len(own)

    def ends(times: np.ndarray, block: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(count) * block
        return times[at], times[np.minimum(at + block, n) - 1]

    q_low, q_high = ends(following, tile.block_m, there.shape[0])
    k_low, k_high = ends(own, tile.block_n, there.shape[1])
    far = np.maximum(np.abs(q_high[:, None] - k_low), np.abs(k_high - q_low[:, None]))
    near = np.maximum(np.maximum(q_low[:, None] - k_high, k_low - q_high[:, None]), 0)
    low, high = (time_bucket(torch.from_numpy(apart), 0.301, 129).numpy() for apart in (near, far))
    return float((high - low)[there].sum())


def predict(case: AttentionCase, direction: str) -> Prediction:
    """What a direction of "fwd", "bwd", "fwd+bwd" takes, in bfloat16."""
    work, kernels, pairs, flops = Work(), {}, 0, 0
    sizes, counts = np.unique(lengths(case.law, case.rows, case.longest), return_counts=True)
    rows = [make(replace(case, rows=1), "cpu", torch.bfloat16, 0, sizes=sizes[i : i + 1]) for i in range(len(sizes))]
    for row, count in zip(rows, counts.tolist(), strict=True):
        one = cost(row)
        pairs += count * one.pairs
        for part in direction.split("+"):
            flops += count * one.flops[part]
            work.memory += count * one.bytes[part]
    for part in direction.split("+"):
        keys = tiles.keys_of(
            {"fwd": "forward", "bwd": "backward"}[part], architecture=ARCHITECTURE, half=True,
            dim=max(case.dim_qk, case.dim_v), bias="narrow" if case.position or case.time else "",
            max_seq_len=case.longest,
        )  # fmt: skip
        for key in keys:
            tile, computed, edges = tiles.choose(key), 0.0, 0.0
            for row, count in zip(rows, counts.tolist(), strict=True):
                seen = visible_pairs(row.fixed["mask"], row.fixed["offsets"], max_seq_len=case.longest)[0]
                there = visited(seen, tile)
                many = count * case.heads * tile.block_m * tile.block_n
                computed += many * there.sum()
                if case.time:
                    bias = row.fixed["bias"]
                    edges += many * edges_within(bias.key_times.numpy(), bias.query_times.numpy(), there, tile)
            kernel = key.kernel.removesuffix("_packed")
            apart = "backward_query" in [each.kernel for each in keys]
            add(work, case, f"{kernel} without dQ" if apart and kernel == "backward" else kernel, computed, edges)
            if key.kernel == "backward" and not apart:
                work.atomics += 4 * case.dim_qk * computed / tile.block_n
                tokens = int(sizes @ counts)
                work.memory += 10 * tokens * case.heads * case.dim_qk  # zeros, sums read, dQ written
            kernels[key.kernel] = (tile, computed / case.heads / pairs)
    return Prediction(work, pairs, flops, kernels)


def add(work: Work, case: AttentionCase, kernel: str, pairs: float, edges: float) -> None:
    """What a kernel does over so many pairs of tiles and pairs of edges, all heads counted."""
    backward = kernel.startswith("backward") and kernel != "backward_query"
    of_qk, of_v = PRODUCTS[kernel]
    work.matrix += 2 * (of_qk * case.dim_qk + of_v * case.dim_v) * pairs
    work.special += pairs
    work.arithmetic += ARITHMETIC[kernel] * pairs
    if case.position:
        work.arithmetic += (POSITION + POSITION_GRADIENT * backward) * pairs
        work.shared += (1 + 2 * backward) * pairs
    if case.time:
        work.arithmetic += TIME * pairs + (EDGE + EDGE_GRADIENT * backward) * edges


def judge(target: Target, operator: Operator = OPERATOR) -> dict[str, Any]:
    """A target beside what counting allows.

    Returns:
        "slow" and "fast": the target's value if no unit overlaps with another, and if all do; "prediction" of its case.
    """
    case = operator.case(target.case)
    found = predict(case, target.direction)
    fast, slow = found.bounds()
    if target.measure == "tflops":
        low, high = found.flops / slow / 1e12, found.flops / fast / 1e12
    else:
        plain = predict(operator.case(case.against), target.direction)
        share = found.pairs / plain.pairs
        fast, slow = (own / other / share for own, other in zip(found.bounds(), plain.bounds(), strict=True))
        low, high = (slow, fast) if target.measure == "per_pair" else (1 / slow, 1 / fast)
    return {"slow": low, "fast": high, "prediction": found}


def reading(target: Target, found: dict[str, Any]) -> str:
    """In words."""
    either = {target.judge(found[name]) for name in ("slow", "fast")}
    if either == {"target"}:
        return "target even without overlap"
    if "target" in either:
        return "target, if units overlap well"
    if "floor" in either:
        return "floor; the target is out of reach of these kernels and tiles"
    return "below the floor, whatever overlaps: other kernels or tiles are needed"


COLUMNS = ("row", "kernels: tile, pairs computed / exact", "ms of each unit alone", "bounds", "floor", "target",
           "reading", "state")  # fmt: skip
UNITS = {"memory": "TB/s", "matrix": "TFLOP/s", "atomics": "TB/s"}


def table() -> str:
    """Markdown."""
    told = describe(["benchmarks.kernels.predict"])
    assumed = ", ".join(f"{name} {rate / 1e12:.3g} {UNITS.get(name, 'T/s')}" for name, rate in RATES.items())
    text = "# Attention rows on one H100: predicted, unmeasured\n\n"
    text += f"`python -m benchmarks.kernels.predict`, commit {told.get('git_commit', 'unknown')[:12]}, torch "
    text += f"{told['torch']}. Counted work over assumed rates: {assumed}.\n"
    text += "The bounds: no unit overlaps with another; all do. What is counted and what is not: the script's head.\n\n"
    text += "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n"
    for target in ATTENTION.values():
        found = judge(target)
        own: Prediction = found["prediction"]
        kernels = [f"{name} {tile.block_m}x{tile.block_n} {more:.2f}" for name, (tile, more) in own.kernels.items()]
        spent = [f"{name} {1e3 * seconds:.2f}" for name, seconds in own.work.seconds().items() if seconds]
        bounds = "{:.3g} to {:.3g}".format(*sorted((found["slow"], found["fast"])))
        cells = [f"{target.what}, {target.direction}", "; ".join(kernels), ", ".join(spent)]
        cells += [f"{bounds} {target.unit}", f"{target.floor:g}", f"{target.target:g}"]
        cells += [reading(target, found), "predicted, unmeasured"]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def main(argv: list[str]) -> int:
    parser = parser_of("benchmarks.kernels.predict", __doc__)
    parser.add_argument("--out", type=Path, help="write the table here, too")
    options = parser.parse_args(argv)
    check_folder("--out", options.out)
    text = table()
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
