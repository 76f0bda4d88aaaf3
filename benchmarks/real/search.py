"""The log of the search for our own recipes: what was tried, and what it reached on validation.

    python -m benchmarks.real.search runs/try-1 [runs/...]       # keeps rows; makes benchmarks/results/recipes.md anew

A row holds what a run changes against the first one of its data set, and its best validation scores. Test scores are
not kept: nothing was chosen by them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.real.record import epochs, portable
from benchmarks.written import RESULTS
from gr.config import parse_yaml

ROWS = RESULTS / "recipe_search.jsonl"
PAGE = RESULTS / "recipes.md"
IGNORED = ("name", "runs", "cache", "device", "data", "evaluation")
HEAD = """# Our own recipes, and how they were found

Made by `python -m benchmarks.real.search`. Every run trains on the leave-one-out split and is scored on validation
events alone (HR@10 and NDCG@10, items already seen masked, the best epoch of each run, seed 0); the first row of a data
set and encoder is where that search began, the others say what they change against it (patience of early stopping left
out). `gr-train` scores every run on test events too when it ends; those scores were seen and chose nothing. The recipe
that was taken trained further seeds (README).
"""


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def row_of(run: Path) -> dict[str, Any]:
    """What is kept of a run, finished or stopped."""
    data = json.loads((run / "data.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    config = parse_yaml((run / "config.yaml").read_text(), str(run / "config.yaml"))
    scored = [entry for entry in epochs(run / "metrics.jsonl") if "ndcg@10" in entry]
    best = max(scored, key=lambda entry: entry["ndcg@10"])
    return {
        "run": run.name,
        "source": Path(config["data"].get("path") or config["data"].get("name", "")).parent.name,
        "content_hash": data["content_hash"],
        "commit": environment.get("git_commit"),
        "config": {k: v for k, v in portable(config).items() if k not in IGNORED},
        "best": best,
        "epochs": scored[-1]["epoch"],
        "scores": scored,
    }


def page(rows: list[dict[str, Any]], notes: str) -> str:
    """Markdown: one table a data set, in the order in which runs were made."""
    parts = [HEAD]
    for source, kind in dict.fromkeys(map(_searched, rows)):
        mine = [row for row in rows if _searched(row) == (source, kind)]
        first = flat(mine[0]["config"])
        lines = [
            f"## {source}, `{kind}`",
            "",
            "| run | change | epochs | best at | HR@10 | NDCG@10 |",
            "|---|---|---|---|---|---|",
        ]
        for row in mine:
            here = flat(row["config"])
            names = [name for name in {**first, **here} if first.get(name) != here.get(name)]
            names = [name for name in names if not name.startswith("train.early_stopping")]
            change = ", ".join(f"`{name}` {here.get(name, '-')}" for name in names) if row is not mine[0] else "(start)"
            best = row["best"]
            lines.append(
                f"| {row['run']} | {change} | {row['epochs']} | {best['epoch']} | {best['hr@10']:.4f} | "
                f"{best['ndcg@10']:.4f} |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, notes])


def _searched(row: dict[str, Any]) -> tuple[str, str]:
    """(data set, encoder): what one search is of."""
    return row["source"], row["config"]["model"]["encoder"]["kind"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    arguments = parser.parse_args()
    kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for run in arguments.runs:
        row = row_of(run)
        kept = [old for old in kept if old["run"] != row["run"]] + [row]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in kept))
    notes = PAGE.with_name("recipes_notes.md")
    PAGE.write_text(page(kept, notes.read_text() if notes.exists() else ""))


if __name__ == "__main__":
    main()
