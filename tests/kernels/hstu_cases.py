"""Cases for every backend of HSTU attention: all pairs of options, on jagged rows with empty ones among them."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gr.kernels.hstu_attention import Mask, RelativeBias, hstu_attention

# Options that mean nothing without each other stand in one value, so that each pair of values does something.
OPTIONS: dict[str, tuple] = {
    "causal": (True, False),
    "window": ((None, None), (2, None), (2, 1), (None, 1)),  # window, full_tail
    "contextual": (False, True),
    "targets": (None, 1, 2, 3),  # the size of a group of targets; None is no targets
    "position": (  # the table's rows, the ids that index it
        None,
        ("shared", "index"),
        ("shared", "target_clamped"),
        ("per_head", "index"),
        ("per_head", "target_clamped"),
    ),
    "short_table": (False, True),  # a position table shorter than the sequences, clamped
    "time": (None, "shared", "per_head"),
    "times": ("rising", "shuffled"),
    "divisor": ("number", "row", "query", "query_column", "visible"),
    "form": ("full", "delta"),
    "dims": ((2, 2), (3, 2), (1, 3)),  # d_qk, d_v
    "heads": (1, 2),
    "integers": (torch.int64, torch.int32),  # of offsets, counts and times
}


@dataclass(frozen=True)
class Case:
    """One choice of every option; fields are the keys of ``OPTIONS``."""

    causal: bool
    window: tuple[int | None, int | None]
    contextual: bool
    targets: int | None
    position: tuple[str, str] | None
    short_table: bool
    time: str | None
    times: str
    divisor: str
    form: str
    dims: tuple[int, int]
    heads: int
    integers: torch.dtype

    @property
    def id(self) -> str:
        """Short name for pytest: what differs from the plain causal call."""
        words = ["causal" if self.causal else "all"]
        words += [f"{word}{n}" for word, n in zip(("window", "tail"), self.window, strict=True) if n]
        words += ["context"] * self.contextual + [f"targets{self.targets}"] * (self.targets is not None)
        if self.position:
            words.append("_".join(("pos", *self.position)) + "_short" * self.short_table)
        if self.time:
            words.append(f"time_{self.time}_{self.times}")
        words += [self.divisor, self.form, "qk{}v{}".format(*self.dims), f"h{self.heads}"]
        words += ["i32"] * (self.integers == torch.int32)
        return "-".join(words)

    def arguments(
        self,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        *,
        longest: int = 5,
        batch: int = 4,
        width: int = 1,
        device: str = "cpu",
    ) -> dict[str, Any]:
        """Keyword arguments of ``hstu_attention``: the same values for the same seed, whatever dtype and device.

        Args:
            dtype: Of q, k and v. Tables have it too, but at least float32, as in a model under autocast.
            seed: Of all values and lengths.
            longest: Length of the longest row of keys, at least 3.
            batch: Rows, at least 3: an empty one, one of a single token, one of ``longest``, random ones.
            width: Multiplies both dims, for kernels that want them larger.
            device: Where the tensors are.

        Returns:
            q, k, v and the tables are leaves that require grad.
        """
        draw = random.Random(f"{seed} {self.id}")
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        lengths, fresh = _lengths(draw, longest, batch, self.form == "delta")
        counts = [_counts(draw, n, self.contextual, self.targets is not None) for n in lengths]
        total, num_queries = sum(lengths), sum(fresh)
        max_seq_len = longest + 1

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            values = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return values.to(device=device, dtype=dtype).requires_grad_()

        def tensor(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        dim_qk, dim_v = (width * d for d in self.dims)
        table_dtype = torch.promote_types(dtype, torch.float32)
        rows = {"shared": (), "per_head": (self.heads,)}
        position = time = key_times = query_times = None
        if self.position:
            entries = 2 * (longest // 2 if self.short_table else max_seq_len) - 1
            position = leaf(*rows[self.position[0]], entries, dtype=table_dtype)
        if self.time:
            time = leaf(*rows[self.time], 12, dtype=table_dtype)
            # From an origin of its own; no time of 32 bits is negative.
            first = 0 if self.integers == torch.int32 else -100
            seconds = [[first + draw.randrange(200) for _ in range(n)] for n in lengths]
            if self.times == "rising":
                seconds = [sorted(row) for row in seconds]
            newest = [row[len(row) - new :] for row, new in zip(seconds, fresh, strict=True)]
            key_times = tensor(list(itertools.chain(*seconds)), self.integers)
            query_times = tensor([s + 3 for s in itertools.chain(*newest)], self.integers)
        by_query = tensor([draw.uniform(1, 9) for _ in range(num_queries)], torch.float32)
        divisor = {
            "number": 7.0,
            "row": tensor([draw.randrange(1, 9) for _ in lengths]),
            "query": by_query,
            "query_column": by_query[:, None],
            "visible": "visible",
        }[self.divisor]
        bias = RelativeBias(
            position_table=position,
            clamp_positions=self.short_table,
            time_table=time,
            key_times=key_times,
            query_times=query_times,
            position_ids=self.position[1] if self.position else "index",
        )
        mask = Mask(
            causal=self.causal,
            window=self.window[0],
            full_tail=self.window[1],
            num_contextual=tensor([c for c, _ in counts], self.integers) if self.contextual else None,
            num_targets=tensor([t for _, t in counts], self.integers) if self.targets else None,
            target_group=self.targets if self.targets != 1 else None,
        )
        return {
            "q": leaf(num_queries, self.heads, dim_qk),
            "k": leaf(total, self.heads, dim_qk),
            "v": leaf(total, self.heads, dim_v),
            "q_offsets": tensor([0, *itertools.accumulate(fresh)], self.integers),
            "kv_offsets": tensor([0, *itertools.accumulate(lengths)], self.integers) if self.form == "delta" else None,
            "max_seq_len": max_seq_len,
            "divisor": divisor,
            "alpha": 0.6,
            "mask": mask,
            "bias": bias if self.position or self.time else None,
        }


def _lengths(draw: random.Random, longest: int, batch: int, delta: bool) -> tuple[list[int], list[int]]:
    """Lengths of the rows of keys and of queries."""
    while True:
        lengths = [0, 1, longest, *(draw.randint(2, longest) for _ in range(batch - 3))]
        draw.shuffle(lengths)
        fresh = [draw.randint(0, n) for n in lengths] if delta else lengths
        if sum(fresh) > batch:  # with T_q = B a divisor of one entry a query could not be told from (B,)
            return lengths, fresh


def _counts(draw: random.Random, length: int, contextual: bool, targets: bool) -> tuple[int, int]:
    """How many contextual tokens and targets a row has: any number that fits, history may be missing."""
    num_targets = draw.randint(0, min(length, 4)) if targets else 0
    return (draw.randint(0, min(length - num_targets, 3)) if contextual else 0), num_targets


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What has a gradient, by name: q, k, v and the tables there are."""
    found = {name: arguments[name] for name in ("q", "k", "v")}
    tables = {name: getattr(arguments["bias"], name, None) for name in ("position_table", "time_table")}
    return found | {name: table for name, table in tables.items() if table is not None}


def run(arguments: dict[str, Any], rounded: torch.dtype | None = None, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for ``hstu_attention(**arguments, **more)`` and the gradient of every leaf, for one random gradient
    of the output that depends on its shape only, with the numbers of ``rounded`` if that is given."""
    out = hstu_attention(**arguments, **more)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad = grad.to(rounded or torch.float64)
    names = leaves(arguments)
    return out, dict(zip(names, torch.autograd.grad(out, list(names.values()), grad.to(out)), strict=True))


def pairs_of(row: dict[str, Any]) -> set:
    """Every pair of (option, value) in a row."""
    return set(itertools.combinations(row.items(), 2))


def all_pairs(options: dict[str, tuple]) -> set:
    """Every pair of (option, value), of two different options."""
    both = itertools.combinations(options.items(), 2)
    return {((a, x), (b, y)) for (a, left), (b, right) in both for x in left for y in right}


def covering_array(options: dict[str, tuple], seed: int = 0, tries: int = 20) -> list[dict[str, Any]]:
    """Few rows in which every pair of values of every two options occurs (greedy, each row the best of ``tries``)."""
    draw = random.Random(seed)
    missing = all_pairs(options)
    order = list(options)

    def grow() -> dict[str, Any]:
        row = dict(draw.choice(sorted(missing, key=repr)))  # a pair still missing, so that every row is a step forward
        for name in draw.sample(order, len(order)):
            if name not in row:
                values = draw.sample(options[name], len(options[name]))
                row[name] = max(values, key=lambda value: len(missing & pairs_of(ordered(row | {name: value}))))  # noqa: B023
        return ordered(row)

    def ordered(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in order if name in row}

    rows = []
    while missing:
        best = max((grow() for _ in range(tries)), key=lambda row: len(missing & pairs_of(row)))
        missing -= pairs_of(best)
        rows.append(best)
    return rows


CASES: list[Case] = [Case(**row) for row in covering_array(OPTIONS, seed=1)]


REDRAWS = 32


def compare(
    case: Case, dtype: torch.dtype, backend: str, seed: int = 0, *, deterministic: bool = False, **shape: int
) -> None:
    """Asserts, of the output and every gradient: the error against float64, relative to the largest value, is at most
    twice the definition's own in this dtype, or 4 ulp.

    All are given the numbers of ``dtype``, float64 too: how inputs were rounded is nobody's error. The definition's own
    error is the largest of ``REDRAWS``: of its inputs as they are, then moved by up to an ulp each, always against
    float64 of the same inputs. One alone is no estimate of how exact a dtype can be: rounding errors are as good as
    random, and where a sum has few terms, or cancels, those errors often cancel as well (0.7 ulp was seen once where 4
    are usual). Other last bits draw other rounding errors of the same problem, and how much its sums cancel stays;
    other values would change that. The backend has one draw. A suite has thousands, so some lie four deviations out:
    the largest of 32 is about 2.4 deviations, twice that lets a backend as exact as the definition pass them all, and
    one that is half as exact fail by the dozen.
    """
    rows = case.arguments(dtype, seed, **shape)
    exact, own, scale = {}, defaultdict(float), {}
    got = by_name(rows, backend, deterministic=deterministic)
    missed = dict.fromkeys(got, 0.0)
    for moved in range(REDRAWS):
        at = _moved(rows, moved) if moved else rows
        truth, low = by_name(_widened(at), "reference", rounded=dtype), by_name(at, "reference")
        for name, values in truth.items():
            assert got[name].dtype == low[name].dtype and got[name].shape == values.shape
            if not moved:
                exact[name], scale[name] = values, float(values.abs().max()) if values.numel() else 0.0
            if not scale[name]:
                assert moved or not got[name].any()
                missed.pop(name, None)
                continue
            own[name] = max(own[name], float((low[name] - values).abs().max()) / scale[name])
            error = float((got[name] - exact[name]).abs().max()) / scale[name]
            if error <= max(2 * own[name], 4 * torch.finfo(dtype).eps):
                missed.pop(name, None)
            elif name in missed:
                missed[name] = error
        if not missed:
            return
    raise AssertionError({name: (error, own[name]) for name, error in missed.items()})


def _moved(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same call, every value of the leaves times 1 + r eps, r in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)

    def moved(values: Tensor) -> Tensor:
        turn = 2 * torch.rand(values.shape, generator=g, dtype=torch.float64) - 1
        return (values.double() * (1 + torch.finfo(values.dtype).eps * turn)).to(values.dtype)

    return _with_leaves(arguments, moved)


def _widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64, of the same numbers."""
    return _with_leaves(arguments, Tensor.double)


def _with_leaves(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    found = {name: change(leaf.detach()).requires_grad_() for name, leaf in leaves(arguments).items()}
    tables = {name: found.pop(name) for name in ("position_table", "time_table") if name in found}
    return arguments | found | {"bias": replace(arguments["bias"], **tables) if tables else arguments["bias"]}


def by_name(arguments: dict[str, Any], backend: str, **more: Any) -> dict[str, Tensor]:
    """The output, as "out", and every gradient."""
    out, gradients = run(arguments, backend=backend, **more)
    return {"out": out.detach(), **gradients}


def plain(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of a plain causal call with both tables, float64 unless told otherwise."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([4, 0, 7, 1, 7])
    tokens = int(lengths.sum())
    times = torch.cat([torch.randint(0, 10**6, (int(n),), generator=g).sort().values for n in lengths])
    leaf = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    bias = RelativeBias(position_table=leaf(13), time_table=leaf(40), key_times=times, query_times=times + 5)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    q, k, v = leaf(tokens, 2, 3), leaf(tokens, 2, 3), leaf(tokens, 2, 4)
    return dict(q=q, k=k, v=v, q_offsets=offsets, max_seq_len=7, divisor=5.0, alpha=1.0, bias=bias)
