"""What the proofs of the launchers share: a shortened quick-start, its weights in one word, and where results go."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
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


def write_result(theme: str, command: str, rows: list[tuple[str, str]]) -> Path:
    """``benchmarks/results/<theme>_<date>.md``: what ran, where, and what was seen."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    mark = " with changes" if dirty.stdout.strip() else ""
    head = [
        ("command", f"`{command}`"),
        ("commit", commit.stdout.strip() + mark),
        ("machine", f"{os.cpu_count()} CPU cores ({platform.machine()}), shared with other work; no GPU used"),
        ("versions", f"Python {platform.python_version()}, torch {torch.__version__}"),
    ]
    path = RESULTS / f"{theme}_{datetime.date.today():%Y%m%d}.md"
    lines = [f"# {theme.replace('_', ' ')}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in [*head, *rows]]
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())
    return path
