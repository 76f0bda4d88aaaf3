"""A study of six runs of a second each, for tests of what plans and runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--design.budgets", "[2e8, 4e8]", "--design.scales", "[1, 2]", "--limits.max_epochs", "40"]


def write_study(place: Path) -> Path:
    """The tiny study on a log of 300 users."""
    base = (ROOT / "configs/scaling/tiny_hstu.yaml").read_text().replace("num_users: 6000", "num_users: 300")
    (place / "tiny_hstu.yaml").write_text(base)
    return Path(shutil.copy(ROOT / "configs/scaling/tiny.yaml", place / "tiny.yaml"))


def study_args(study: Path, out: Path, *more: str, holdout: str = "[]") -> list[str]:
    """Arguments of its commands; all of one ``study`` share the prepared log."""
    places = ["--out", str(out), "--cache", str(study.parent / "cache")]
    return [str(study), *SMALL, "--holdout.budgets", holdout, *places, *more]
