"""Writes measured figures into README.md, so that none is typed by hand.

    python -m benchmarks.readme

Between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` README holds what ``SECTIONS[NAME]`` makes of the files in
``benchmarks/results/``. A test fails when they differ.
"""

from __future__ import annotations

import json
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


ATTENTION = ("hstu_attention", "ml1m", "fwd+bwd")


def cpu() -> str:
    """Ratios on a CPU: training and evaluation (``benchmarks.train.ml1m``), attention (``benchmarks.kernels.run``)."""
    trained = [json.loads(line) for line in (RESULTS / "cpu_ml1m_epyc_20261123.jsonl").read_text().splitlines()]
    kernels = [json.loads(line) for line in (RESULTS / "cpu_kernels_epyc_20261123.jsonl").read_text().splitlines()]
    lines = ["| on a CPU, times as fast as | plain padded form | lean padded form |", "|---|---|---|"]
    for part, title in (("epoch", "training, fp32"), ("evaluation", "evaluation of every user among all items")):
        for allocator, words in (("default", "usual allocator"), ("kept", "freed memory kept")):
            found = [row for row in trained if (row["measurement"], row["provider"]) == (part, "hstu")]
            found = {row["baseline"]: _spread(row["ratio"]) for row in found if row["allocator"] == allocator}
            lines.append(f"| {title}, {words} | {found['plain']} | {found['plain_lean']} |")
    for row in kernels:
        if [row[k] for k in ("operator", "case", "direction", "provider")] == [*ATTENTION, "native"]:
            words = {"default": "usual allocator", "kept": "freed memory kept"}[row["allocator"]]
            lines.append(f"| attention alone, forward and backward, {words} | {_spread(row['ratio'])} | |")
    losses = next(row for row in trained if row["measurement"] == "losses")
    memory = {row["provider"]: row["peak_gib"] for row in trained if row["measurement"] == "memory"}
    bf16 = [row for row in trained if row["measurement"] == "epoch" and row["provider"] == "hstu_bf16"]
    bf16 = next(row for row in bf16 if (row["baseline"], row["allocator"]) == ("plain_lean", "kept"))
    facts = (
        f"Largest relative difference of the first {losses['steps']} losses: "
        f"{losses['largest_relative_difference']:.0e}.",
        f"Peak memory of a process that trains an epoch: {memory['hstu']:.2f} GiB (lean padded form "
        f"{memory['plain_lean']:.2f}).",
        f"bfloat16 on this processor, which has no units for it, is {_spread(bf16['ratio'])} times as fast as the lean "
        "form in fp32.",
    )
    return "\n".join(lines) + "\n\n" + "\n".join(facts)


def _spread(ratio: dict[str, float]) -> str:
    return "{median:.1f} ({low:.1f} to {high:.1f})".format(**ratio)


SECTIONS: dict[str, Callable[[], str]] = {"quickstart": quickstart, "quality": quality, "cpu": cpu}


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
