"""Clocks to time with, and what a GPU can do at all: the ceilings that its figures stand beside."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""Several times any second-level cache so far (H100: 50 MiB)."""
FLUSHES = 8
"""Some 0.8 ms on an H100: meanwhile the host enqueues the call, so that launches are not what is timed."""
COPY_BYTES = 1 << 30
MATMUL = 8192
RUNS = 20


class CpuTimer:
    """Wall-clock seconds; one run a repeat."""

    runs = 1

    def start(self) -> None:
        self._begin = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._begin


class CudaTimer:
    """Seconds between two events on the current stream; caches are flushed before the first."""

    runs = 10

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        for _ in range(FLUSHES):
            self._flush.zero_()
        self._events[0].record()

    def stop(self) -> float:
        self._events[1].record()
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def timer(device: str) -> CpuTimer | CudaTimer:
    """The clock of a type of device."""
    return CudaTimer() if device == "cuda" else CpuTimer()


def ceilings() -> dict[str, Any]:
    """The current GPU's own best: "copy_gbs" (bytes read and written), "matmul_tflops" (8192^3, bfloat16), "clocks".

    Clocks are read in the middle of products, when they are lowest.
    """
    copied = _copy_seconds()
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = _median_seconds(lambda: torch.mm(a, b, out=out))
    for _ in range(int(1 / product)):  # a second of work, for nvidia-smi takes a while
        torch.mm(a, b, out=out)
    seen = clocks()
    torch.cuda.synchronize()
    return {
        "copy_gbs": 2 * COPY_BYTES / copied / 1e9,
        "matmul_tflops": 2 * MATMUL**3 / product / 1e12,
        "clocks": seen,
    }


def _copy_seconds() -> float:
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _median_seconds(lambda: target.copy_(source))


def clocks() -> dict[str, float] | None:
    """ "sm_mhz", "memory_mhz", "watts", "celsius" of the current GPU now; None without nvidia-smi."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    command += [] if uuid is None else ["-i", f"GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_clocks(done.stdout)


def parse_clocks(text: str) -> dict[str, float]:
    """The first line of nvidia-smi's answer; what it does not know ("[N/A]") is left out."""
    found = {}
    for name, word in zip(("sm_mhz", "memory_mhz", "watts", "celsius"), text.split("\n")[0].split(","), strict=False):
        try:
            found[name] = float(word)
        except ValueError:
            continue
    return found


def _median_seconds(call: Callable[[], Any]) -> float:
    """Median over runs after some to warm up; these run long enough to need no flush."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    for _ in range(5):
        call()
    for event in events:
        event.record()
        call()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3
