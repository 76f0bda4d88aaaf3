"""What a person wants to see of running processes: pace, use of the device, balance, padding, memory, rank by rank."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from gr.data.batch import JaggedBatch
from gr.data.loader import predicted_cost
from gr.distributed.process import ProcessContext
from gr.flops import device_peak_flops, training_flops, utilisation

T = TypeVar("T")
_COUNTS = ("tokens", "pairs", "forward_flops", "seconds_ns", "waited_ns", "slots", "dense_slots", "memory")


class Stopwatch:
    """Adds up stretches of time on a device without waiting for it: on a GPU the times are read afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._marks.append((self._now(), None))

    def __exit__(self, *_: object) -> None:
        self._marks[-1] = (self._marks[-1][0], self._now())

    def nanoseconds(self) -> int:
        """The sum; on a GPU only after something later was read from it."""
        if self._cuda:
            return sum(int(begin.elapsed_time(end) * 1e6) for begin, end in self._marks)
        return sum(end - begin for begin, end in self._marks)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Work:
    """What one rank did in one step.

    Attributes:
        tokens: Tokens learned from; likewise ``pairs`` and ``forward_flops``, as far as the model tells.
        slots: Rows of the token columns, padding included.
        dense_slots: B * N: what they would be, were all rows padded to the longest of their batch.
        forward: Time of the forward passes.
    """

    tokens: int
    pairs: int
    forward_flops: int
    slots: int
    dense_slots: int
    forward: Stopwatch

    @property
    def cost(self) -> int:
        """As the loader predicts it."""
        return predicted_cost(self.tokens, self.pairs)


def slots(batch: JaggedBatch) -> tuple[int, int]:
    """(rows of the token columns, B * N) of a batch."""
    return next(iter(batch.tokens.values())).shape[0], batch.num_sequences * batch.max_seq_len


@dataclass
class Waited:
    """Host time spent waiting for batches, in ns."""

    ns: int = 0

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches."""
        while True:
            begin = time.perf_counter_ns()
            batch = next(batches, None)
            self.ns += time.perf_counter_ns() - begin
            if batch is None:
                return
            yield batch


@dataclass
class Watch:
    """Sums since the last line of metrics.jsonl, of every rank.

    All ranks tell each other ``numbers`` in one collective, as integers, wherever losses are read anyway.

    Args:
        ctx: The processes.
        bf16: Whether matrix products run in bfloat16.
    """

    ctx: ProcessContext
    bf16: bool
    steps: int = 0
    _ranks: list[dict[str, int]] = field(default_factory=list)
    _cost: tuple[int, float] = (0, 0.0)  # of the dearest rank, of the mean rank: sums over steps
    _forward: tuple[int, float] = (0, 0.0)

    def numbers(self, works: Sequence[Work], seconds: float, waited: Waited) -> list[int]:
        """What this rank has to tell of the steps since it was last asked."""
        sums = [sum(getattr(work, n) for work in works) for n in ("tokens", "pairs", "forward_flops")]
        padding = [sum(getattr(work, n) for work in works) for n in ("slots", "dense_slots")]
        times = [int(seconds * 1e9), waited.ns]
        waited.ns = 0
        per_step = [work.cost for work in works] + [work.forward.nanoseconds() for work in works]
        return [*sums, *times, *padding, peak_memory(self.ctx.device), *per_step]

    def add(self, everybody: Sequence[Sequence[int]]) -> dict[str, int]:
        """Takes in the numbers of all ranks.

        Returns:
            Exact sums over ranks of ``tokens``, ``pairs``, ``forward_flops``.
        """
        count = len(_COUNTS)
        steps = (len(everybody[0]) - count) // 2
        self.steps += steps
        self._ranks = self._ranks or [dict.fromkeys(_COUNTS, 0) for _ in everybody]
        for rank, told in zip(self._ranks, everybody, strict=True):
            for name, value in zip(_COUNTS, told, strict=False):
                rank[name] = max(rank[name], value) if name == "memory" else rank[name] + value
            rank["forward_ns"] = rank.get("forward_ns", 0) + sum(told[count + steps :])
        self._cost = _dearest(self._cost, [told[count : count + steps] for told in everybody])
        self._forward = _dearest(self._forward, [told[count + steps :] for told in everybody])
        return {name: sum(told[i] for told in everybody) for i, name in enumerate(_COUNTS[:3])}

    def line(self) -> dict[str, Any]:
        """Fields of a line of metrics.jsonl, and a new beginning; empty without a step.

        - ``step_s``: seconds a step, of the fastest, mean and slowest rank.
        - ``achieved_tflops``: model TFLOP/s (3x forward, exact pairs), all ranks together; ``mfu``: that over the peak
          of the devices, where it is known.
        - ``imbalance``: the dearest rank over the mean one, by predicted ``cost`` and by time of the ``forward``, in
          which ranks do not wait for each other (but in the look-up of sharded tables).
        - ``padding``: the share of token rows that are padding, and what it would be ``if_dense``, each rank's batch
          padded to its longest row.
        - ``memory_gib``: the largest peak so far, of a GPU's allocations or of a process.
        - ``ranks``: lists by rank.
        """
        if not self.steps:
            return {}
        ranks, steps = self._ranks, self.steps
        seconds = [rank["seconds_ns"] / 1e9 for rank in ranks]
        flops = training_flops(sum(rank["forward_flops"] for rank in ranks))
        tokens = sum(rank["tokens"] for rank in ranks)
        line: dict[str, Any] = {"step_s": _spread([s / steps for s in seconds])}
        if flops and min(seconds) > 0:
            line["achieved_tflops"] = flops / max(seconds) / 1e12
            mfu = utilisation(flops, max(seconds), _peak(self.ctx.device, self.bf16), len(ranks))
            line |= {} if mfu is None else {"mfu": mfu}
        line["imbalance"] = {
            name: dearest / mean for name, (dearest, mean) in (("cost", self._cost), ("forward", self._forward)) if mean
        }
        line["padding"] = {
            "tokens": 1 - tokens / max(1, sum(rank["slots"] for rank in ranks)),
            "if_dense": 1 - tokens / max(1, sum(rank["dense_slots"] for rank in ranks)),
        }
        line["memory_gib"] = max(rank["memory"] for rank in ranks) / 2**30
        line["ranks"] = {
            "step_s": [s / steps for s in seconds],
            "forward_s": [rank["forward_ns"] / 1e9 / steps for rank in ranks],
            "waited_for_data_s": [rank["waited_ns"] / 1e9 / steps for rank in ranks],
            "tokens": [rank["tokens"] for rank in ranks],
            "pairs": [rank["pairs"] for rank in ranks],
            "memory_gib": [rank["memory"] / 2**30 for rank in ranks],
        }
        self.steps, self._ranks, self._cost, self._forward = 0, [], (0, 0.0), (0, 0.0)
        return line


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or the most that this process held (Linux' VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _dearest(before: tuple[int, float], by_rank: Sequence[Sequence[int]]) -> tuple[int, float]:
    """Adds (of the dearest rank, of the mean rank) of each step."""
    steps = list(zip(*by_rank, strict=True))
    return before[0] + sum(map(max, steps)), before[1] + sum(map(sum, steps)) / len(by_rank)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _peak(device: torch.device, bf16: bool) -> float | None:
    if device.type != "cuda":
        return None
    exact = torch.get_float32_matmul_precision() == "highest"
    return device_peak_flops(torch.cuda.get_device_name(device), "bf16" if bf16 else "fp32" if exact else "tf32")
