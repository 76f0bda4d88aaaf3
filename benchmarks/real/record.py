"""Keeps what a finished run found: one row of ``benchmarks/results/real_runs.jsonl``, and its per-user ranks.

    python -m benchmarks.real.record runs/ml-1m_hstu-s0 [runs/...] [--baselines]

A row holds the command, the resolved config and its hash, seed, data (content hash, counts, caveats), commit and
machine, losses along the way, validation scores, and the test metrics under every rule that the run was judged by: its
own, and those of ``gr-evaluate``. Ranks go to ``benchmarks/results/ranks/<run>.<rule>.parquet``; with ``--baselines``
those of the run's baselines too. A row of the same run is replaced. Paths of this machine are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.written import RESULTS
from gr.config import parse_yaml
from gr.evaluation.ranking import COLUMNS, Ranks
from gr.evaluation.saved_ranks import load_ranks

ROWS = RESULTS / "real_runs.jsonl"
RANKS = RESULTS / "ranks"
KEPT = ("better", "tied", "candidates")
RULES = {False: "keep", True: "mask", "window": "window"}
"""Names of ``evaluation.mask_seen``."""


def row_of(run: Path) -> dict[str, Any]:
    """The row of a finished run."""
    results = json.loads((run / "results.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    model = results["model"]
    own = results["metrics"]
    judged = {RULES[results["protocol"]["mask_seen"]]: own}
    for folder in evaluations(run):
        other = json.loads((folder / "results.json").read_text())
        judged[RULES[other["protocol"]["mask_seen"]]] = other["metrics"]
    return {
        "run": run.name,
        "label": model["label"],
        "seed": results["seed"],
        "config": portable(parse_yaml((run / "config.yaml").read_text(), str(run / "config.yaml"))),
        "config_hash": results["config_hash"],
        "data": results["data"] | {"content_hash": json.loads((run / "data.json").read_text())["content_hash"]},
        "num_candidates": results["protocol"]["num_candidates"],
        "command": bare_command(environment["command"]),
        "commit": environment.get("git_commit"),
        "git_dirty": environment.get("git_dirty"),
        **{name: environment.get(name) for name in ("cpu", "threads", "torch", "python")},
        "parameters": model["parameters_dense"] + model["parameters_tables"],
        "epochs_run": model["epochs_run"],
        "best_step": model["best_step"],
        "best_metrics": model["best_metrics"],
        "minutes": round(model["seconds"] / 60, 1),
        "epochs": epochs(run / "metrics.jsonl"),
        "metrics": {
            rule: {
                who: {name: _rounded(value) for name, value in found.items() if isinstance(value, dict)}
                | ({"setting": found["setting"]} if found.get("setting") else {})
                for who, found in metrics.items()
            }
            for rule, metrics in judged.items()
        },
        "audit": results["audit"],
    }


def bare_command(command: str) -> str:
    """A command without this machine's folders; where results and caches went is left out."""
    words, kept = shlex.split(command), []
    for place, word in enumerate(words):
        if word not in ("--runs", "--cache") and (place == 0 or words[place - 1] not in ("--runs", "--cache")):
            kept.append(
                re.sub(r"/(?:[\w.-]+/)+", "", word) if "/" in word and not word.startswith("configs/") else word
            )
    return shlex.join(kept)


def evaluations(run: Path) -> list[Path]:
    """Folders in which ``gr-evaluate`` left test scores of the run's best weights."""
    return sorted(f for f in (run / "evaluations").glob("test-*") if not f.name.endswith("-last"))


def epochs(path: Path) -> list[dict[str, Any]]:
    """Mean training loss of the logged steps of each epoch (the first is 1; some have none), and validation scores."""
    losses: dict[int, list[float]] = {}
    scores: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            losses.setdefault(entry["epoch"] + 1, []).append(entry["loss"])
        found = {k: round(entry["evaluation"][k], 5) for k in ("hr@10", "ndcg@10")} if "evaluation" in entry else {}
        if found:
            scores[entry["epoch"] + 1] = found
    every = sorted({*losses, *scores})
    mean = {epoch: round(float(np.mean(values)), 4) for epoch, values in losses.items()}
    return [{"epoch": e} | ({"loss": mean[e]} if e in mean else {}) | scores.get(e, {}) for e in every]


def keep_ranks(ranks: Ranks, path: Path) -> None:
    """What metrics are made of, as small as it gets: int32, zstd.

    Which items the targets are is not kept, for these logs may not be redistributed; a hash tells whether two files are
    of the same targets in the same order.
    """
    wanted = [np.asarray(getattr(ranks, name)).astype(np.int64) for name in ("user", "position", "target")]
    targets = hashlib.sha256(np.concatenate(wanted).tobytes()).hexdigest()
    columns = {name: pa.array(np.asarray(getattr(ranks, name)).astype(np.int32)) for name in KEPT}
    table = pa.table(columns).replace_schema_metadata({"num_items": str(ranks.num_items), "targets_sha256": targets})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=19)


def kept_ranks(path: Path) -> tuple[Ranks, str]:
    """What ``keep_ranks`` wrote (users, positions and targets are not known), and the hash of its targets."""
    table = pq.read_table(path)
    arrays = {name: table[name].to_numpy().astype(np.int64) for name in KEPT}
    unknown = {name: np.arange(table.num_rows) for name in COLUMNS if name not in KEPT}
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    return Ranks(**unknown, **arrays, num_items=int(metadata["num_items"])), metadata["targets_sha256"]


def rows() -> dict[str, dict[str, Any]]:
    """Every row that is kept, by the run's name."""
    if not ROWS.exists():
        return {}
    return {row["run"]: row for row in map(json.loads, ROWS.read_text().splitlines())}


def record(run: Path, baselines: bool) -> None:
    """Adds or replaces a run's row and ranks."""
    row = row_of(run)
    kept = rows() | {row["run"]: row}
    ROWS.write_text("".join(json.dumps(kept[name], ensure_ascii=False) + "\n" for name in sorted(kept)))
    places = [(run, run / "ranks_test.parquet", run / "stages" / "baselines")]
    places += [(folder, folder / "ranks.parquet", folder) for folder in evaluations(run)]
    for folder, ranks, counted in places:
        rule = RULES[json.loads((folder / "results.json").read_text())["protocol"]["mask_seen"]]
        keep_ranks(load_ranks(ranks), RANKS / f"{run.name}.{rule}.parquet")
        for path in sorted(counted.glob("ranks_*.parquet")) if baselines else ():
            kind = path.stem.removeprefix("ranks_")
            if kind == "repeat_last":  # where what was seen is masked, it is Popularity
                continue
            keep_ranks(load_ranks(path), RANKS / f"{run.name}.{rule}.{kind}.parquet")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without this machine's folders: names of files stay, where they lay goes."""
    return {key: _bare(value) for key, value in config.items() if key not in ("runs", "cache")}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    return value


def _rounded(value: dict[str, float]) -> dict[str, float]:
    return {key: round(number, 6) for key, number in value.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--baselines", action="store_true")
    arguments = parser.parse_args()
    for run in arguments.runs:
        record(run, arguments.baselines)
        print(f"{run.name}: kept")


if __name__ == "__main__":
    main()
