"""Runs small enough for tests: a planted world of 300 users, a model of width 16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from gr import config as configs
from gr.distributed.process import ProcessContext
from gr.recipes.retrieval import run
from gr.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
WORLD: dict[str, Any] = {
    "kind": "planted", "num_users": 300, "num_items": 120, "num_topics": 4, "subtopics": 2, "num_interests": 4,
    "min_events": 6, "max_events": 12,
}  # fmt: skip
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": WORLD,
    "layout": {"max_events": 12},
    "model": {
        "dim": 16,
        "encoder": {"kind": "hstu", "num_layers": 1, "num_heads": 2, "dim_qk": 8, "dim_v": 8, "dropout": 0.1},
        "preprocessor": {"dropout": 0.1},
    },
    "train": {"epochs": 2, "batching": {"batch_size": 64}, "optimizer": {"lr": 0.01}, "log_every_steps": 1,
              "early_stopping": {"patience": 0}, "tensorboard": False},
    "evaluation": {"baselines": ["popularity", "markov"]},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """The tiny config as ``tiny.yaml`` in a folder, with some top-level parts replaced."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def config(folder: Path, *overrides: str, **changes: Any) -> RunConfig:
    """The same, loaded, with run and cache folders inside ``folder``."""
    places = ("--runs", str(folder / "runs"), "--cache", str(folder / "cache"))
    return configs.load(RunConfig, write(folder, **changes), [*overrides, *places])


def run_here(folder: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    """Runs the recipe in this process."""
    results = run(config(folder, *overrides, **changes), ProcessContext(), ["gr-train", "tiny.yaml"])
    assert results is not None
    return results


def environment() -> dict[str, str]:
    """For a subprocess: the checkout first, one thread, nothing of a surrounding torchrun."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def train_process(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """``gr-train`` as a process of its own, in ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "gr.train", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def train(folder: Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of ``gr-train``."""
    process = train_process(folder, *arguments, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
