"""Writes measured figures into README.md, so that none is typed by hand.

    python -m benchmarks.readme

Between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` README holds what ``SECTIONS[NAME]`` makes of the files in
``benchmarks/results/``. A test fails when they differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def quickstart() -> str:
    """What ``make train`` printed, as it was (the end of it: the table and what follows)."""
    lines = (RESULTS / "quickstart.txt").read_text().rstrip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("quickstart:"))
    return "```\n" + "\n".join(line.rstrip() for line in lines[first:]) + "\n```"


def quality() -> str:
    """The table of ``benchmarks.train.quality``."""
    return "\n".join(line for line in (RESULTS / "planted_quality.md").read_text().splitlines() if line[:1] == "|")


SECTIONS: dict[str, Callable[[], str]] = {"quickstart": quickstart, "quality": quality}


def render(text: str) -> str:
    """README with every marked section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)", re.DOTALL)
        found = pattern.search(text)
        if found is None:
            raise SystemExit(f"README.md lacks the markers of section {name}")
        text = text[: found.start()] + make() + "\n" + text[found.end() :]
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
