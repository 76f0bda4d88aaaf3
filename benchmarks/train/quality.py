"""What the models reach on the default planted world: every variant x seed, one row each, then a table.

    python -m benchmarks.train.quality [--seeds 0 1 2] [--variants hstu sasrec] [--table-only]

A row is appended to ``benchmarks/results/planted_quality.jsonl`` when its run ends; a row that exists for the same
config is not run again. The table (Markdown, beside the rows) gives means and spreads over seeds. Variants
share data, split, epochs, batches and objective; each one's learning rate was chosen on validation (``LEARNING_RATES``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from gr import config as configs
from gr.distributed.process import process
from gr.recipes.retrieval import run
from gr.training.environment import describe
from gr.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = RESULTS / "planted_quality.jsonl"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "hstu": ("HSTU", []),
    "hstu_no_time": ("HSTU without time bias", ["--model.encoder.time_bias", "false"]),
    "sasrec": (
        "SASRec",
        ["--model.encoder.kind", "transformer", "--model.encoder.num_heads", "4", "--model.encoder.dropout", "0.1"],
    ),
}


def load(variant: str, seed: int, extra: list[str]) -> RunConfig:
    """The quick-start config as a variant changes it."""
    name = ["--name", f"{variant}-{seed}", "--seed", str(seed)]
    return configs.load(RunConfig, ROOT / "configs" / "quickstart.yaml", [*VARIANTS[variant][1], *name, *extra])


def rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def measure(variant: str, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One run from scratch, as a row."""
    config = load(variant, seed, [*extra, "--runs", str(folder), "--cache", str(folder / "cache")])
    with process("cpu") as ctx:
        results = run(config, ctx, ["benchmarks.train.quality", variant, str(seed)])
    assert results is not None, "stopped"
    environment = describe(["benchmarks.train.quality"])
    return {
        "variant": variant,
        "label": VARIANTS[variant][0],
        "seed": seed,
        "config_hash": results["config_hash"],
        "commit": environment.get("git", {}).get("commit") if isinstance(environment.get("git"), dict) else None,
        "cpu": environment.get("cpu"),
        "metrics": results["metrics"],
        "ceiling": results["ceiling"],
        "ceiling_without_times": results["ceiling_without_times"],
        "epochs": results["model"]["epochs_run"],
        "seconds": round(results["model"]["seconds"], 1),
        "audit": results["audit"],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: mean and spread of each variant, baselines once, ceiling last."""
    best, blind = found[0]["ceiling"], found[0]["ceiling_without_times"]
    lines = ["| | seeds | HR@10 | sd over seeds | NDCG@10 | % of the best possible HR@10 |", "|---|---|---|---|---|---|"]

    def line(label: str, hits: list[float], gains: list[float], seeds: str) -> str:
        spread = f"{statistics.stdev(hits):.4f}" if len(hits) > 1 else ""
        hit = statistics.mean(hits)
        return f"| {label} | {seeds} | {hit:.4f} | {spread} | {statistics.mean(gains):.4f} | {100 * hit / best['hr@10']:.1f} |"

    for label, _ in VARIANTS.values():
        mine = [row["metrics"][label] for row in found if row["label"] == label]
        if mine:
            hits, gains = ([m[name]["mean"] for m in mine] for name in ("hr@10", "ndcg@10"))
            lines.append(line(label, hits, gains, str(len(mine))))
    counted = [(n, m) for n, m in found[0]["metrics"].items() if n not in {label for label, _ in VARIANTS.values()}]
    for name, m in sorted(counted, key=lambda pair: -pair[1]["hr@10"]["mean"]):
        lines.append(line(name, [m["hr@10"]["mean"]], [m["ndcg@10"]["mean"]], "-"))
    lines.append(line("best possible without times", [blind["hr@10"]], [blind["ndcg@10"]], "-"))
    lines.append(line("best possible", [best["hr@10"]], [best["ndcg@10"]], "-"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not arguments.table_only:
        with tempfile.TemporaryDirectory() as folder:
            for seed in arguments.seeds:
                for variant in arguments.variants:
                    wanted = configs.config_hash(load(variant, seed, []))
                    if any(row["config_hash"] == wanted for row in rows()):
                        continue
                    row = measure(variant, seed, Path(folder), [])
                    with ROWS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    kept = {configs.config_hash(load(v, s, [])) for v in VARIANTS for s in arguments.seeds}
    found = [row for row in rows() if row["config_hash"] in kept]
    if found:
        text = (
            "# The default planted world\n\n`python -m benchmarks.train.quality`. Test targets: the last event of each of "
            f"20,000 users, all 2,000 items ranked. The best possible score is exact, see `gr/data/ceiling.py`.\n\n{table(found)}\n"
        )
        (RESULTS / "planted_quality.md").write_text(text)
        print(table(found))


if __name__ == "__main__":
    main()
