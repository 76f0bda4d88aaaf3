"""NVIDIA's compute-sanitizer over small batches, where it is installed: out-of-bounds accesses, races, bad barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu_check import small
from benchmarks.gpu_check.correctness import DTYPES, backends
from benchmarks.gpu_check.plan import Context, Result, Unit

TOOLS = ("memcheck", "racecheck")
FOUND_SOMETHING = 86
LIMIT_S = 120
INSTALLED = "/usr/local/cuda/bin"


def units(context: Context) -> Iterator[Unit]:
    """One for each tool and each backend that runs on the GPU; on a CPU one, which shows that the batches run."""
    names = [name for name in backends(context.device, DTYPES["float16"]) if name == "triton" or not context.dry]
    for tool in TOOLS[: 1 if context.dry else None]:
        for backend in names:
            yield Unit(f"{tool}/{backend}", partial(watch, tool, backend, context), about_s=60)


def watch(tool: str, backend: str, context: Context) -> Result:
    """Runs :mod:`benchmarks.gpu_check.small` under a tool; on a CPU here, without one."""
    if context.dry:
        small.main(context.device, backend)
        return {"cannot": f"{tool} watches a GPU; the batches ran, unwatched"}
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=INSTALLED)
    if program is None:
        return {"cannot": f"compute-sanitizer is neither on the PATH nor in {INSTALLED}"}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)]
    command += [sys.executable, "-m", "benchmarks.gpu_check.small", context.device, backend]
    environment = dict(os.environ)
    if tool == "memcheck":  # without its cache torch asks CUDA for each tensor, so that a step beside one is seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    limit = max(1.0, min(LIMIT_S, context.left_s()))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"left": f"not done after {limit:.0f} s"}
    if done.returncode == 0:
        return {"say": "found nothing"}
    said = (done.stdout + done.stderr).strip().splitlines()
    if any("Device not supported" in line for line in said):
        return {"cannot": f"{tool}: Device not supported"}
    return {"ok": False, "say": f"status {done.returncode}", "output": said[-60:]}
