"""Runs what a document shows its reader: its blocks, and the commands in them with training made tiny."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--train.max_steps=4", "--train.schedule.warmup_steps=0", "--train.tensorboard=false"]
"""Overrides that make any training short."""
HOMES = {
    "gr-prepare": "gr.prepare",
    "gr-train": "gr.train",
    "gr-evaluate": "gr.evaluate",
    "gr-compare": "gr.compare",
    "gr-recommend": "gr.inference.cli",
    "gr-launch": "gr.launch.cli",
    "gr-plan": "gr.launch.plan",
    "gr-scaling": "gr.scaling.cli",
}
"""The module that holds each command's ``cli``."""


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, contents) of each fenced block of a Markdown text, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code_of(command: str) -> str:
    """Python that does what the installed command of this name does."""
    return f"from {HOMES[command]} import cli; raise SystemExit(cli())"


def execute(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs one of our commands in a folder."""
    return run([sys.executable, "-c", code_of(words[0]), *words[1:]], folder)


def run(
    words: list[str], folder: Path, timeout: float = 280, **more: str | os.PathLike[str]
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a folder, with this checkout's ``gr`` and one thread; ``more`` are variables of its
    environment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
