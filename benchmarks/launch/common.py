"""What the proofs of the launchers share: a shortened quick-start, and its weights in one word."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.written import ROOT

CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def overrides(name: str, steps: int) -> list[str]:
    """The quick-start's own model, data and optimizer; fewer steps, no baselines, more to resume from."""
    return [
        *("--name", name, "--device", "cpu", "--train.max_steps", str(steps), "--evaluation.baselines", "[]"),
        *("--train.checkpoint_every_steps", "20", "--train.log_every_steps", "1", "--train.tensorboard", "false"),
    ]


def environment() -> dict[str, str]:
    """This checkout first, one thread a process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def gr_launch(*words: str) -> list[str]:
    """The command, without an installation."""
    return [sys.executable, "-m", "gr.launch.cli", *words]


def step_of(run: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[Any]], limit_s: float = 600) -> None:
    """Until training is there; fails if it ended before."""
    end = time.monotonic() + limit_s
    while step_of(run) < step:
        assert time.monotonic() < end, f"step {step_of(run)} of {step} after {limit_s} s"
        assert all(process.poll() is None for process in processes), "training ended too early"
        time.sleep(0.2)


def weights_hash(run: Path) -> str:
    """SHA-256 over names and bytes of the weights in best.pt: equal only if every bit is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(run / "best.pt", weights_only=True)["model"].items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
