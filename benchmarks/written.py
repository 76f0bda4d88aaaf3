"""How results are written down: a page of one measurement, or rows of JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def dated(theme: str, suffix: str) -> Path:
    """``benchmarks/results/<theme>_<date>.<suffix>``."""
    return RESULTS / f"{theme}_{datetime.date.today():%Y%m%d}.{suffix}"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_page(theme: str, command: str, rows: list[tuple[str, str]]) -> None:
    """The page of a theme, dated: what ran, where, and what was seen. It is printed, too."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    mark = " with changes" if dirty.stdout.strip() else ""
    head = [
        ("command", f"`{command}`"),
        ("commit", commit.stdout.strip() + mark),
        ("machine", f"{os.cpu_count()} CPU cores ({platform.machine()}), shared with other work; no GPU used"),
        ("versions", f"Python {platform.python_version()}, torch {torch.__version__}"),
    ]
    lines = [f"# {theme.replace('_', ' ')}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in [*head, *rows]]
    dated(theme, "md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
