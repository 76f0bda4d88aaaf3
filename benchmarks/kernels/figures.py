"""A folder of results for people: rows.jsonl, table.md, and a plot for each family of cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEMORY_BOUND = 1200
"""Below this many tokens a forward pass is limited by memory on an H100, so GB/s stands beside TFLOP/s."""


def write(folder: Path, rows: Sequence[dict[str, Any]], heading: str) -> list[Path]:
    """Writes everything; plots only where matplotlib is installed.

    Args:
        folder: Made if need be.
        rows: From the runner, one measurement each.
        heading: What they were measured on.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "table.md").write_text(table(rows, heading), encoding="utf-8")
    return [folder / "rows.jsonl", folder / "table.md", *plots(folder, rows)]


def table(rows: Sequence[dict[str, Any]], heading: str) -> str:
    """Markdown: absolute figures of a GPU, ratios of a CPU."""
    absolute = any("ms" in row for row in rows)
    columns = ["case", "direction", "provider"]
    columns += ["ms", "TFLOP/s", "of matmul", "GB/s", "of copy"] if absolute else []
    columns += ["x baseline (low to high)", "x base (low to high)", "cost of a pair, x plain"]
    text = "".join(f"{line}  \n" for line in heading.splitlines())
    text += "\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    for row in rows:
        star = " *" if "function" in row else ""
        cells = [row["case"], row["direction"], row["provider"] + star]
        if absolute:
            short = row["parameters"].get("longest", 0) < MEMORY_BOUND
            cells += [f"{row['ms']['median']:.3f}", f"{row['tflops']['median']:.1f}", f"{row['share_of_matmul']:.0%}"]
            cells += [f"{row['gbs']['median']:.0f}", f"{row['share_of_copy']:.0%}"] if short else ["", ""]
        cells += [_spread(row.get("ratio")), _spread(row.get("base", {}).get("ratio")), _spread(row.get("per_pair"))]
        text += "| " + " | ".join(cells) + " |\n"
    notes = {row["provider"]: row["function"] for row in rows if "function" in row}
    text += "".join(f"\n\\* {name}: {about}\n" for name, about in notes.items())
    return text


def _spread(found: dict[str, Any] | None) -> str:
    return "" if not found else "{median:.2f} ({low:.2f} to {high:.2f})".format(**found)


def plots(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """One picture a direction: TFLOP/s of a GPU, or speed relative to the baseline; a bar a provider and case."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        some = [row for row in rows if row["direction"] == direction and ("tflops" in row or "ratio" in row)]
        if not some:
            continue
        cases = list(dict.fromkeys(row["case"] for row in some))
        providers = list(dict.fromkeys(row["provider"] for row in some))
        figure, axes = pyplot.subplots(figsize=(max(6.0, 0.9 * len(cases)), 4.0), layout="constrained")
        width = 0.8 / len(providers)
        for place, provider in enumerate(providers):
            own = {row["case"]: row.get("tflops") or row["ratio"] for row in some if row["provider"] == provider}
            at = [cases.index(case) + (place - (len(providers) - 1) / 2) * width for case in own]
            heights = [each["median"] for each in own.values()]
            errors = [
                [each["median"] - each["low"] for each in own.values()],
                [each["high"] - each["median"] for each in own.values()],
            ]
            axes.bar(at, heights, width, yerr=errors, label=provider)
        axes.set_xticks(range(len(cases)), cases, rotation=45, ha="right")
        axes.set_ylabel("TFLOP/s" if "tflops" in some[0] else "speed relative to the definition")
        axes.set_title(f"{some[0]['operator']}, {direction}")
        axes.legend()
        path = folder / f"{direction.replace('+', '_')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        found.append(path)
    return found
