"""``runs.csv``: a row a run, in the order of run ids; what differs between two machines, or two commits, lies in
``timings.csv``.

Needs no torch, and reads tables of other systems: ``COLUMNS`` are the ones that a fit needs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gr.errors import UserError
from gr.files import write_text
from gr.scaling.store import all_runs, read_json

COLUMNS = ("run_id", "budget", "n_encoder", "tokens", "model_flops", "loss")
MEASURED = ("steps", "tokens", "pairs", "model_flops", "flops_dense", "flops_attention", "flops_head", "n_encoder",
            "n_dense", "n_sparse", "train_loss", "loss_floor")  # fmt: skip
METRICS = ("hr@", "ndcg@", "mrr")
ALIKE = {
    "variant": "choose one with --variant",
    "recipe": "fit each recipe by itself",
    "data_hash": "fit runs of one log only",
    "eval_hash": "runs must be judged alike",
}


def collect(folder: Path) -> tuple[Path, int]:
    """Writes both tables of a study, of runs in any state.

    Returns:
        ``runs.csv`` and the number of its rows.

    Raises:
        UserError: Nothing was run.
    """
    rows, timings = [], []
    for run in all_runs(folder):
        spec, result, state = run.spec(), run.result() or {}, run.state()
        row: dict[str, Any] = {name: getattr(spec, name) for name in ("run_id", "study", "variant", "recipe")}
        row |= {"status": state, "reason": run.reason()}
        row |= {"scale": spec.scale, "budget": spec.budget, "seed": spec.seed, "holdout": int(spec.holdout)}
        row |= {"max_events": spec.config["layout"]["max_events"], "train_users": spec.config.get("train_users", 0)}
        row |= {"data_hash": spec.data_hash[:12], "eval_hash": spec.eval_hash, "epochs": spec.planned["epochs"]}
        row |= {name: result.get("measured", {}).get(name) for name in MEASURED}
        rows.append(row | {name: value for name, value in sorted(result.get("metrics", {}).items())})
        timings.append({"run_id": spec.run_id, "code": result.get("code"), **result.get("timings", {})})
    if not rows:
        raise UserError(f"{folder} has no runs; gr-scaling run makes them")
    write_text(folder / "timings.csv", csv_text(timings))
    write_text(folder / "runs.csv", csv_text(rows))
    return folder / "runs.csv", len(rows)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a CSV, whose columns are all of theirs in the order in which they are met."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, columns) of a CSV, as text.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader), list(reader.fieldnames or [])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; gr-scaling collect STUDY writes it") from None


def read_runs(path: Path, variant: str | None = None) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Rows that can be fitted, ``COLUMNS`` and metrics as floats, ``holdout`` as bool, and (run_id, why) of the others.

    Raises:
        UserError: No such file or column, a run twice, or runs that cannot be compared.
    """
    rows, names = read_rows(path)
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; a table of runs needs {', '.join(COLUMNS)}")
    if variant is not None:
        known = sorted({row.get("variant") or "" for row in rows} - {""})
        rows = [row for row in rows if row.get("variant") == variant]
        if not rows:
            raise UserError(f"{path} has no run of variant {variant!r}; it has {', '.join(known) or 'none'}")
    ids = [row["run_id"] for row in rows]
    twice = next((name for i, name in enumerate(ids) if name in ids[:i]), None)
    if twice is not None:
        raise UserError(f"{path} has run {twice} twice; every run must stand there once")
    good, excluded = [], []
    for row in rows:
        status = row.get("status") or "done"
        if status != "done":
            excluded.append((row["run_id"], f"{status}: {row['reason']}" if row.get("reason") else status))
            continue
        for name in COLUMNS[1:]:
            row[name] = _number(path, row, name)
        row["holdout"] = row.get("holdout") in ("1", "True", "true")
        for name in (name for name in names if name.startswith(METRICS)):
            try:
                row[name] = float(row[name])
            except (TypeError, ValueError):
                del row[name]
        good.append(row)
    _refuse_twins(path, good)
    for name, right in ALIKE.items():
        found = sorted({row.get(name) or "" for row in good})
        if len(found) > 1:
            raise UserError(f"{path} mixes {name} {found[0]!r} and {found[1]!r}; {right}")
    return good, excluded


def _refuse_twins(path: Path, rows: list[dict[str, Any]]) -> None:
    """One cell and seed under two ids was made from two configs, of which one is not this study's."""
    names = ("variant", "recipe", "budget", "n_encoder", "max_events", "train_users", "seed")
    seen: dict[tuple[Any, ...], str] = {}
    for row in (row for row in rows if row.get("seed")):
        cell = tuple(row.get(name) for name in names)
        if cell in seen:
            raise UserError(
                f"{path}: runs {seen[cell]} and {row['run_id']} are one cell and seed, from two configs; delete the "
                "folder of the one that is not of this study, and collect again"
            )
        seen[cell] = row["run_id"]


def read_timings(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the ``timings.csv`` beside a table, by run; none if there is no such file."""
    beside = path.with_name("timings.csv")
    return {row.get("run_id", ""): row for row in read_rows(beside)[0]} if beside.exists() else {}


def _number(path: Path, row: dict[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{path}: run {row['run_id']} has {name} {row[name]!r}; it must be a number above 0")
    return value


def table_hash(path: Path) -> str:
    """Of a table, as a fit remembers it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fits_path(table: Path, variant: str | None) -> Path:
    """Where the fit of a table lies."""
    return table.with_name(f"fits_{variant}.json" if variant else "fits.json")


def read_fit(path: Path) -> dict[str, Any]:
    """What ``gr-scaling fit`` wrote beside a table.

    Raises:
        UserError: Nothing is there.
    """
    raw = read_json(path)
    if not isinstance(raw, dict) or "surface" not in raw:
        raise UserError(f"{path} is missing or damaged; gr-scaling fit writes it")
    return raw
