"""What the models reach on the default planted world: every variant x seed, one row each, then a table.

    python -m benchmarks.train.quality --tune          # learning rate of each variant, on validation
    python -m benchmarks.train.quality                 # three seeds each, on test
    python -m benchmarks.train.quality --table-only

A row is appended to ``benchmarks/results/planted_{tuning,quality}.jsonl`` when its run ends; a row that exists for the
same config is not run again: after a change to a model's code, delete its rows. Variants share data, split, epochs,
batches and objective. Each one's learning rate is the best of ``RATES`` by validation NDCG@10 (one run each, seed 100,
none of the seeds that are reported).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.written import RESULTS, ROOT, append_row
from gr import config as configs
from gr.distributed.process import process
from gr.recipes.retrieval import run
from gr.training.environment import describe
from gr.training.run_config import RunConfig

ROWS = RESULTS / "planted_quality.jsonl"
TUNED = RESULTS / "planted_tuning.jsonl"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "hstu": ("HSTU", []),
    "hstu_no_time": ("HSTU without time bias", ["--model.encoder.time_bias", "false"]),
    "sasrec": (
        "SASRec",
        ["--model.encoder.kind", "transformer", "--model.encoder.num_heads", "4", "--model.encoder.dropout", "0.1"],
    ),
    "transformer": (
        "Transformer (pre-norm, FFN 4D)",
        [
            *("--model.encoder.kind", "transformer", "--model.encoder.num_heads", "4"),
            *("--model.encoder.dropout", "0.1", "--model.encoder.block", "pre_norm"),
            *("--model.encoder.ffn_dim", "256", "--model.encoder.activation", "gelu"),
        ],
    ),
}
# What a longer training buys the attention baselines: their best rate, three times the epochs, one seed.
LONGER = {
    f"{name}_24": (f"{VARIANTS[name][0]}, 24 epochs", [*VARIANTS[name][1], *rate, "--train.epochs", "24"])
    for name, rate in {name: ["--train.optimizer.lr", "0.008"] for name in ("sasrec", "transformer")}.items()
}
VARIANTS |= LONGER
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
TUNING_SEED = 100


def load(variant: str, seed: int, extra: list[str]) -> RunConfig:
    """The quick-start config as a variant changes it."""
    name = ["--name", f"{variant}-{seed}", "--seed", str(seed)]
    return configs.load(RunConfig, ROOT / "configs" / "quickstart.yaml", [*VARIANTS[variant][1], *name, *extra])


def tuning(variant: str, rate: float) -> RunConfig:
    """One point of the learning-rate grid."""
    return load(variant, TUNING_SEED, ["--train.optimizer.lr", str(rate), "--evaluation.baselines", "[]"])


def chosen(variant: str) -> list[str]:
    """The variant's learning rate as an override: the best tuned one, or the quick-start's where nothing was tuned."""
    wanted = {configs.config_hash(tuning(variant, rate)): rate for rate in RATES}
    tried = [row for row in rows(TUNED) if row["config_hash"] in wanted]
    if not tried:
        return []
    best = max(tried, key=lambda row: row["valid_ndcg@10"])
    return ["--train.optimizer.lr", str(wanted[best["config_hash"]])]


def rows(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Results of one run from scratch."""
    config = dataclasses.replace(config, runs=str(folder), cache=str(folder / "cache"))
    with process("cpu") as ctx:
        results = run(config, ctx, ["benchmarks.train.quality"])
    assert results is not None, "stopped"
    return results


def row_of(variant: str, results: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    environment = describe(["benchmarks.train.quality"])
    return {
        "variant": variant,
        "label": VARIANTS[variant][0],
        "seed": results["seed"],
        "config_hash": results["config_hash"],
        "commit": environment.get("git_commit"),
        "cpu": environment.get("cpu"),
        "torch": environment.get("torch"),
        "threads": environment.get("threads"),
        "git_dirty": environment.get("git_dirty"),
        "valid_ndcg@10": results["model"]["best_metrics"]["ndcg@10"],
        "model": results["metrics"][results["model"]["label"]],
        "baselines": {n: m for n, m in results["metrics"].items() if n != results["model"]["label"]},
        "ceiling": results["ceiling"],
        "ceiling_without_times": results["ceiling_without_times"],
        "best_step": results["model"]["best_step"],
        "seconds": round(results["model"]["seconds"], 1),
        "audit": results["audit"],
    }


def tune(variants: list[str]) -> None:
    """Runs the missing points of the grid."""
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            for rate in RATES:
                config = tuning(variant, rate)
                digest = configs.config_hash(config)
                if any(row["config_hash"] == digest for row in rows(TUNED)):
                    continue
                results = measure(dataclasses.replace(config, name=f"{variant}-{rate}"), Path(folder))
                kept = row_of(variant, results)
                append_row(
                    TUNED,
                    {k: kept[k] for k in ("variant", "config_hash", "commit", "valid_ndcg@10", "best_step")}
                    | {"lr": rate},
                )


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: mean and spread of each variant, baselines once, ceiling last."""
    best, blind = found[0]["ceiling"], found[0]["ceiling_without_times"]
    lines = [
        "| | seeds | HR@10 | sd over seeds | NDCG@10 | % of the best possible HR@10 |",
        "|---|---|---|---|---|---|",
    ]

    def line(label: str, hits: list[float], gains: list[float], seeds: str) -> str:
        spread = f"{statistics.stdev(hits):.4f}" if len(hits) > 1 else ""
        hit = statistics.mean(hits)
        share = f"{100 * hit / best['hr@10']:.1f}"
        return f"| {label} | {seeds} | {hit:.4f} | {spread} | {statistics.mean(gains):.4f} | {share} |"

    for label, _ in VARIANTS.values():
        mine = [row["model"] for row in found if row["label"] == label]
        if mine:
            hits, gains = ([m[name]["mean"] for m in mine] for name in ("hr@10", "ndcg@10"))
            lines.append(line(label, hits, gains, str(len(mine))))
    counted = found[0]["baselines"].items()
    for name, m in sorted(counted, key=lambda pair: -pair[1]["hr@10"]["mean"]):
        lines.append(line(name, [m["hr@10"]["mean"]], [m["ndcg@10"]["mean"]], "-"))
    lines.append(line("best possible without times", [blind["hr@10"]], [blind["ndcg@10"]], "-"))
    lines.append(line("best possible", [best["hr@10"]], [best["ndcg@10"]], "-"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.tune:
        tune(arguments.variants)
        return
    wanted = {
        configs.config_hash(config): (variant, config)
        for seed in arguments.seeds
        for variant in arguments.variants
        if variant not in LONGER or seed == arguments.seeds[0]
        for config in [load(variant, seed, chosen(variant))]
    }
    if not arguments.table_only:
        with tempfile.TemporaryDirectory() as folder:
            for digest, (variant, config) in wanted.items():
                if not any(row["config_hash"] == digest for row in rows(ROWS)):
                    append_row(ROWS, row_of(variant, measure(config, Path(folder))))
    found = [row for row in rows(ROWS) if row["config_hash"] in wanted]
    if found:
        tuned = [v for v in arguments.variants if v not in LONGER]
        rates = ", ".join(f"{VARIANTS[v][0]} {' '.join(chosen(v)[1:]) or 'as in the quick start'}" for v in tuned)
        made = {
            name: sorted({str(row[name]) for row in found if row.get(name)})
            for name in ("cpu", "torch", "threads", "commit")
        }
        (RESULTS / "planted_quality.md").write_text(
            "# The default planted world\n\n`python -m benchmarks.train.quality`. Test targets: the last event of "
            "each of 20,000 users; all 2,000 items ranked; 8 epochs unless said. Learning rates, chosen on validation: "
            f"{rates} (24 epochs: the same). The best possible score is an exact expectation, see "
            f"`gr/data/ceiling.py`.\n\n{table(found)}\n\nMade on {', '.join(made['cpu'])}, threads "
            f"{'/'.join(made['threads'])}, torch {', '.join(made['torch'])}, at commits "
            f"{', '.join(c[:7] for c in made['commit'])}; config hashes and all metrics stand in "
            "`planted_quality.jsonl`.\n"
        )
        print(table(found))


if __name__ == "__main__":
    main()
