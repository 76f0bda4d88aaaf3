"""How long a provider takes on a case: which there are, one call, and many in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.kernels import device as devices
from benchmarks.kernels.agreement import SEED
from benchmarks.kernels.registry import BASELINE, Call, Case, Operator
from gr.errors import UserError

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Timed = Callable[[str, str, str, int], float]
"""(case, provider, direction, seed) -> seconds."""


def available(operator: Operator, case: Case, wanted: list[str] | None, device: str, dtype: torch.dtype) -> list[str]:
    """Providers to time, the baseline first; on a CPU it is always among them.

    Without ``wanted``: the operator's own, and on a GPU the other functions too.

    Raises:
        UserError: A provider asked for does not exist, or not on the device.
    """
    own = operator.providers()
    known = (*own, *(other.name for other in operator.others))
    for name in wanted or ():
        if name not in known and ":" not in name:
            raise UserError(f"--providers: {operator.name} has no provider {name!r}; it has {', '.join(known)}")
    names = list((known if device == "cuda" else own) if wanted is None else dict.fromkeys(wanted))
    part, _ = operator.shorten(operator.make(case, device, dtype, SEED), 1)
    found = []
    for name in names:
        try:
            operator.call(part, name).run()
        except ValueError as error:
            if not str(error).startswith("backend"):
                raise
            if wanted is not None:
                raise UserError(f"--providers: {name!r} does not run on {device}: {error}") from error
            continue
        found.append(name)
    first = [BASELINE] if device == "cpu" or BASELINE in found else []
    return first + [name for name in found if name != BASELINE]


def seconds(timer: devices.CpuTimer | devices.CudaTimer, call: Call, direction: str, layers: int) -> float:
    """Time of one call of ``layers`` on the same batch."""

    def forward() -> list[torch.Tensor]:
        return [call.run() for _ in range(layers)]

    def backward(outs: list[torch.Tensor]) -> None:
        while outs:
            torch.autograd.grad(outs.pop(), call.leaves, call.grad)

    def once() -> float:
        if direction == "fwd":
            with torch.no_grad():
                timer.start()
                forward()
                return timer.stop()
        if direction == "bwd":
            outs = forward()
            timer.start()
            backward(outs)
            return timer.stop()
        timer.start()
        backward(forward())
        return timer.stop()

    return statistics.median(once() for _ in range(timer.runs)) / layers


def here(operator: Operator, device: str, dtype: torch.dtype, layers: int) -> Timed:
    """Times in this process, each on a batch of its own."""
    timer = devices.timer(device)

    def timed(case: str, provider: str, direction: str, seed: int) -> float:
        inputs = operator.make(operator.case(case), device, dtype, seed)
        return seconds(timer, operator.call(inputs, provider), direction, layers)

    return timed


def measure(
    case: Case,
    providers: dict[str, list[str]],
    directions: Sequence[str],
    repeats: int,
    clocks: dict[str, Timed],
) -> dict[tuple[str, str, str, str], list[float]]:
    """Seconds of each repeat by (clock, case, provider, direction), everything timed in turn.

    Args:
        case: The case; the one that it names is timed too.
        providers: Those of each clock, by its name.
        directions: Of "fwd", "bwd", "fwd+bwd".
        repeats: After a first round that warms up.
        clocks: By name: this process, or another commit's.
    """
    cases = [case.name] if case.against is None else [case.name, case.against]
    names = dict.fromkeys(name for some in providers.values() for name in some)
    entries = [(name, one, clock) for name in names for one in cases for clock in clocks if name in providers[clock]]
    found: dict[tuple[str, str, str, str], list[float]] = {}
    seed = SEED
    for direction in directions:
        for repeat in range(-1, repeats):
            for provider, one, clock in entries:
                seed += 1
                spent = clocks[clock](one, provider, direction, seed)
                if repeat >= 0:
                    found.setdefault((clock, one, provider, direction), []).append(spent)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(other: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as another, repeat by repeat."""
    apart = [theirs / ours for theirs, ours in zip(other, own, strict=True)]
    return {"ratios": apart, "ratio": spread(apart)}
