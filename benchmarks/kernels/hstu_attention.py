"""HSTU attention to be measured: the shapes of ML-1M on a CPU, those that peers publish on a GPU, jagged and masked.

Counts follow the peers' convention, with exact pairs P: forward 2 H (d_qk + d_v) P, backward 2.5 times that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.lengths import lengths
from benchmarks.kernels.others import OTHERS
from benchmarks.kernels.registry import Case, Cost, Inputs, Operator, external
from gr import flops
from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention, op
from gr.kernels.hstu_attention.time_buckets import NARROW

TIME_BUCKETS = 129
"""Entries of the paper's time table."""
SESSION_ENDS = 0.04
"""Chance that a gap between events is hours to months rather than seconds."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """One batch.

    Attributes:
        rows: B.
        longest: N.
        law: Lengths, see :func:`benchmarks.kernels.lengths.lengths`.
        heads: H.
        dim_qk: d_qk of a head.
        dim_v: d_v of a head.
        position: With a position bias.
        time: With a time bias.
        context: Contextual tokens of a row, at most a quarter of it.
        targets: Targets of a row, at most a quarter of it.
        window: As in the mask.
        full_tail: As in the mask.
        divisor: A number; None is N.
    """

    rows: int
    longest: int
    law: str = "full"
    heads: int = 1
    dim_qk: int = 64
    dim_v: int = 64
    position: bool = False
    time: bool = False
    context: int = 0
    targets: int = 0
    window: int | None = None
    full_tail: int | None = None
    divisor: float | None = None


BIAS = {"position": True, "time": True}


def _cpu(name: str, **fields) -> AttentionCase:
    return AttentionCase(name=name, family=name, device="cpu", **fields)


def _gpu(family: str, dim: int, longest: int, rows: int, against: str | None = None, **fields) -> AttentionCase:
    """Four heads, as in the peers' tables."""
    size = f"-{longest}-4x{dim}"
    shape = {"heads": 4, "dim_qk": dim, "dim_v": dim, "longest": longest, "rows": rows}
    against = against and against + size
    return AttentionCase(name=family + size, family=family, device="cuda", against=against, **shape, **fields)


ML1M = {"rows": 128, "longest": 200, "law": "ml1m", "dim_qk": 50, "dim_v": 50, "divisor": 211.0}
SMALL = {"rows": 16, "longest": 512, "heads": 2, "dim_qk": 32, "dim_v": 32}
SMALL_MASK = {"window": 64, "full_tail": 16, "context": 4, "targets": 32}
LARGE_MASK = {"window": 512, "full_tail": 128, "context": 8, "targets": 256}
# N and B: the peers' 4 heads at N = 4096, B = 32, and as many tokens at other lengths; twice as many at N = 512, where
# the target's batch is 512.
SIZES = ((512, 512), (1024, 128), (2048, 64), (4096, 32), (8192, 16))

TRIAL = {"rows": 3, "longest": 17, "dim_qk": 8, "dim_v": 8, "law": "uniform"}

CASES = (
    AttentionCase(name="trial", family="trial", device="none", **TRIAL),
    _cpu("ml1m", **ML1M, **BIAS, against="ml1m-no-bias"),
    _cpu("ml1m-no-bias", **ML1M),
    _cpu("full", **SMALL),
    _cpu("uniform", **SMALL, law="uniform"),
    _cpu("zipf", **SMALL, law="zipf"),
    _cpu("bias", **SMALL, **BIAS, law="uniform", against="uniform"),
    _cpu("composed", **SMALL, **SMALL_MASK, law="uniform", against="uniform"),
    *(_gpu("full", dim, n, b) for dim in (128, 64) for n, b in SIZES),
    *(_gpu("uniform", dim, n, b, law="uniform") for dim in (128, 64) for n, b in ((512, 512), (4096, 32))),
    *(_gpu("zipf", dim, n, b, law="zipf") for dim in (128, 64) for n, b in ((512, 512), (4096, 32))),
    *(_gpu("bias", dim, n, b, "full", **BIAS) for dim in (128, 64) for n, b in ((512, 512), (4096, 32))),
    *(_gpu("bias-uniform", dim, 4096, 32, "uniform", law="uniform", **BIAS) for dim in (128, 64)),
    *(_gpu("bias-zipf", dim, 4096, 32, "zipf", law="zipf", **BIAS) for dim in (128, 64)),
    *(_gpu("composed", dim, 4096, 32, "full", **LARGE_MASK) for dim in (128, 64)),
    *(_gpu("composed-uniform", dim, 4096, 32, "uniform", law="uniform", **LARGE_MASK) for dim in (128, 64)),
    *(_gpu("composed-bias", dim, 4096, 32, "full", **LARGE_MASK, **BIAS) for dim in (128, 64)),
)


def make(case: AttentionCase, device: str, dtype: torch.dtype, seed: int, sizes: np.ndarray | None = None) -> Inputs:
    """A batch of the case; values are normal, scores about one. ``sizes`` are lengths in place of the law's."""
    rng = np.random.default_rng(seed)
    sizes = rng.permutation(lengths(case.law, case.rows, case.longest) if sizes is None else sizes)
    tokens = int(sizes.sum())
    generator = torch.Generator(device).manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        found = torch.randn(shape, generator=generator, device=device) * scale
        return found.to(dtype).requires_grad_()

    leaves = {"q": leaf(tokens, case.heads, case.dim_qk), "k": leaf(tokens, case.heads, case.dim_qk)}
    leaves["v"] = leaf(tokens, case.heads, case.dim_v)
    times: dict[str, Tensor] = {}
    if case.position:
        leaves["position_table"] = leaf(2 * case.longest - 1, scale=0.5)
    if case.time:
        leaves["time_table"] = leaf(TIME_BUCKETS, scale=0.5)
        both = event_times(rng, sizes)
        narrow = max(each.max(initial=0) for each in both) < NARROW  # as in the batches of gr.data
        key_times, query_times = (torch.from_numpy(each).to(device, torch.int32 if narrow else None) for each in both)
        times = {"key_times": key_times, "query_times": query_times}

    def count(most: int) -> Tensor | None:
        return torch.from_numpy(np.minimum(most, sizes // 4)).to(device) if most else None

    fixed = {
        "lengths": sizes,
        "offsets": torch.from_numpy(np.concatenate(([0], np.cumsum(sizes)))).to(device),
        "mask": Mask(
            window=case.window,
            full_tail=case.full_tail,
            num_contextual=count(case.context),
            num_targets=count(case.targets),
        ),
        "bias": RelativeBias(**times),
        "longest": case.longest,
        "divisor": float(case.longest if case.divisor is None else case.divisor),
        "alpha": 1 / math.sqrt(case.dim_qk),
    }
    return Inputs(leaves, fixed, leaf(tokens, case.heads, case.dim_v).detach())


def event_times(rng: np.random.Generator, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times of events in sessions: bursts of seconds, many of them equal, then hours to months of nothing.

    Returns:
        ``(T,)`` int64 seconds each: of a token's own event, and of the next one, which is to be predicted.
    """
    count = int(sizes.sum()) + len(sizes)  # one event more than tokens in each row
    burst = np.exp(rng.uniform(0, math.log(60), count)) - 1
    pause = np.exp(rng.uniform(math.log(3_600), math.log(1e7), count))
    clock = np.cumsum(np.where(rng.random(count) < SESSION_ENDS, pause, burst).astype(np.int64))
    first = np.cumsum(sizes + 1) - sizes - 1
    clock += 1_000_000_000 - clock[first].repeat(sizes + 1)
    last = np.zeros(count, dtype=bool)
    last[np.cumsum(sizes + 1) - 1] = True
    return clock[~last], clock[np.flatnonzero(~last) + 1]


def run(inputs: Inputs, provider: str, deterministic: bool = False) -> Tensor:
    """The public operator with that backend, or another implementation of it.

    ``package.module:function`` is called as ``function(q, k, v, offsets, *, max_seq_len, divisor, alpha, num_targets,
    num_contextual, window, full_tail, position_table, time_table, query_times, key_times)`` and returns
    ``(T, H, d_v)``; what a case has not is None; it must be differentiable. Shapes and meanings: README.md of the
    operator; the mask is causal. It is held to the definition like a backend.
    """
    leaves, fixed = inputs.leaves, inputs.fixed
    if ":" in provider:
        return _external(inputs, provider)
    tables = {name: leaves[name] for name in ("position_table", "time_table") if name in leaves}
    return hstu_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        fixed["offsets"],
        max_seq_len=fixed["longest"],
        divisor=fixed["divisor"],
        alpha=fixed["alpha"],
        mask=fixed["mask"],
        bias=replace(fixed["bias"], **tables) if tables else None,
        deterministic=deterministic,
        backend=provider,
    )


def _external(inputs: Inputs, provider: str) -> Tensor:
    leaves, fixed = inputs.leaves, inputs.fixed
    mask, bias = fixed["mask"], fixed["bias"]
    return external(provider)(
        *(leaves[name] for name in BY_ROW),
        fixed["offsets"],
        max_seq_len=fixed["longest"],
        divisor=fixed["divisor"],
        alpha=fixed["alpha"],
        num_targets=mask.num_targets,
        num_contextual=mask.num_contextual,
        window=mask.window,
        full_tail=mask.full_tail,
        position_table=leaves.get("position_table"),
        time_table=leaves.get("time_table"),
        query_times=bias.query_times,
        key_times=bias.key_times,
    )


def shorten(inputs: Inputs, scores: int) -> tuple[Inputs, Tensor]:
    """Some sequences of the batch, the shortest and the longest among them, at least two if there are two."""
    fixed, leaves = inputs.fixed, inputs.leaves
    sizes, device = fixed["lengths"], inputs.grad.device
    affordable = scores // (leaves["q"].shape[1] * int(sizes.max()) ** 2)
    wanted = min(max(affordable, 2), len(sizes))
    rows = np.sort(np.argsort(sizes, kind="stable")[np.linspace(0, len(sizes) - 1, wanted).round().astype(int)])
    starts = np.cumsum(sizes) - sizes
    kept = torch.from_numpy(np.concatenate([np.arange(starts[r], starts[r] + sizes[r]) for r in rows])).to(device)
    chosen = torch.from_numpy(rows).to(device)

    def of_rows(counts: Tensor | None) -> Tensor | None:
        return None if counts is None else counts[chosen]

    def of_tokens(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[kept]

    mask, bias = fixed["mask"], fixed["bias"]
    some = {
        **fixed,
        "lengths": sizes[rows],
        "offsets": torch.from_numpy(np.concatenate(([0], np.cumsum(sizes[rows])))).to(device),
        "mask": replace(mask, num_contextual=of_rows(mask.num_contextual), num_targets=of_rows(mask.num_targets)),
        "bias": RelativeBias(key_times=of_tokens(bias.key_times), query_times=of_tokens(bias.query_times)),
    }
    few = {name: of_tokens(leaf) if name in BY_ROW else leaf.detach() for name, leaf in leaves.items()}
    few = {name: leaf.clone().requires_grad_() for name, leaf in few.items()}
    return Inputs(few, some, inputs.grad[kept]), kept


def cost(inputs: Inputs) -> Cost:
    """Exact pairs, and what moves if everything is read and written once (offsets and counts are left out)."""
    leaves, mask = inputs.leaves, inputs.fixed["mask"]
    tokens, heads, dim_qk = leaves["q"].shape
    dim_v, item = leaves["v"].shape[2], leaves["q"].element_size()
    counts = (None if n is None else n.cpu().numpy() for n in (mask.num_targets, mask.num_contextual))
    pairs = flops.pairs(inputs.fixed["lengths"], *counts, mask.window, full_tail=mask.full_tail)
    forward = 2 * heads * (dim_qk + dim_v) * pairs
    qk, v = tokens * heads * dim_qk * item, tokens * heads * dim_v * item
    tables = sum(leaves[name].numel() * item for name in leaves if name not in BY_ROW)
    times = 2 * tokens * inputs.fixed["bias"].key_times.element_size() if "time_table" in leaves else 0
    moved = {"fwd": 2 * qk + 2 * v + tables + times, "bwd": 4 * qk + 3 * v + 2 * tables + times}
    return Cost(tokens, pairs, {"fwd": forward, "bwd": forward * 5 // 2}, moved)


BY_ROW = ("q", "k", "v")
OPERATOR = Operator(
    name="hstu_attention",
    cases=CASES,
    providers=lambda: tuple(op.BACKENDS),
    make=make,
    run=run,
    shorten=shorten,
    by_row=BY_ROW,
    cost=cost,
    others=OTHERS,
)
