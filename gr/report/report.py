"""Turns a run folder into ``report.html``: one file, no scripts, nothing loaded from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gr.files import write_text
from gr.report import words
from gr.report.figures import Bar, bars, curve
from gr.report.run_data import RunData, metric_names, read_run

PRIMARY = ("hr@10", "ndcg@10", "mrr")


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a finished run's folder, aside first and then renamed.

    Args:
        run_dir: Folder with ``results.json``, ``metrics.jsonl``, ``env.json`` and ``config.yaml``.

    Returns:
        Path of the report.

    Raises:
        UserError: One of the files is missing, half-written, or lacks a field.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    write_text(path, render(run))
    return path


def render(run: RunData) -> str:
    """The report as HTML; the same run gives the same bytes."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gr.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=words.count, percent=words.percent, label=words.metric_label)
    return environment.get_template("report.html.j2").render(view(run))


def view(run: RunData) -> dict[str, Any]:
    """Everything the template shows, computed here so that the template only lays out."""
    results = run.results
    names = metric_names(results["metrics"][run.model])
    primary = [n for n in PRIMARY if n in names] or names[:3]
    data = results["data"]
    return {
        "name": results["name"],
        "subtitle": _subtitle(run),
        "headline": words.headline(run),
        "plain_headline": "".join(text for text, _ in words.headline(run)),
        "doubts": words.doubts(run),
        "caveats": [str(c) for c in data.get("caveats") or []],
        "audit": results.get("audit"),
        "protocol": _protocol(run),
        "primary": primary,
        "primary_help": [words.metric_help(n) for n in primary],
        "rows": _rows(run, primary),
        "names": names,
        "all_rows": _rows(run, names),
        "ceiling": run.ceiling,
        "ceilings": _ceilings(run),
        "comparison": words.comparison(run),
        "bars": [(words.metric_label(n), _bars(run, n)) for n in primary[:2]],
        "curves": _curves(run),
        "facts": _facts(run),
        "examples": [_example(e) for e in results.get("examples") or []],
        "statistics": _statistics(data),
        "repairs": data.get("repairs") or {},
        "grids": _grids(results.get("baseline_grids") or {}),
        "config_text": run.config_text,
        "env": _flatten(run.env),
    }


def _subtitle(run: RunData) -> list[tuple[str, str]]:
    return [
        (key, words.count(run.results[field]) if field != "seed" else str(run.results[field]))
        for key, field in (("config", "config_hash"), ("seed", "seed"))
        if field in run.results
    ]


def _protocol(run: RunData) -> str:
    data, protocol = run.results["data"], run.results["protocol"]
    targets = data.get("test_targets")
    parts = [f"{words.count(targets)} held-out events" if targets is not None else "Held-out events"]
    if "split" in protocol:
        parts[0] += f" ({str(protocol['split']).replace('_', '-')} split)"
    if protocol.get("num_candidates"):
        parts.append(
            f"each ranked against {words.count(protocol['num_candidates'])} items"
            + (" (the full corpus)" if protocol.get("ranking") == "full" else "")
        )
    if "mask_seen" in protocol:
        parts.append(words.SEEN_RULES[protocol["mask_seen"]])
    if protocol.get("ties"):
        parts.append(f"ties: {protocol['ties']}")
    return "; ".join(parts) + "."


def _rows(run: RunData, names: list[str]) -> list[dict[str, Any]]:
    """Model first, then baselines from best to worst by the first metric."""
    metrics = run.results["metrics"]

    def first(name: str) -> float:
        return -metrics[name].get(names[0], {"mean": float("-inf")})["mean"]

    rows = []
    for name in [run.model, *sorted(run.baselines, key=first)]:
        cells = []
        for metric in names:
            score = metrics[name].get(metric)
            ceiling = run.ceiling.get(metric)
            cells.append(score and {**score, "share": score["mean"] / ceiling if ceiling else None})
        rows.append(
            {
                "name": name,
                "model": name == run.model,
                "setting": _setting(metrics[name]),
                "cells": cells,
            }
        )
    return rows


def _setting(scores: dict[str, Any]) -> str:
    setting = str(scores.get("setting") or "")
    return "" if setting == "-" else setting  # a baseline with nothing to tune


def _ceilings(run: RunData) -> list[dict[str, Any]]:
    best = {"name": "Ceiling", "help": "the best that can be expected on this data", "values": run.ceiling}
    blind = run.results.get("ceiling_without_times") or {}
    without = {
        "name": "Ceiling without times",
        "help": "for a model that reads the order alone",
        "values": blind,
    }
    return [row for row in (best, without) if row["values"]]


def _bars(run: RunData, metric: str) -> str:
    scores = {row["name"]: run.results["metrics"][row["name"]].get(metric) for row in _rows(run, [metric])}
    rows = [Bar(name, s["mean"], s["low"], s["high"], name == run.model) for name, s in scores.items() if s]
    return bars(
        f"bars-{metric.replace('@', '')}",
        f"{words.metric_label(metric)} of every recommender",
        rows,
        run.ceiling.get(metric),
    )


def _curves(run: RunData) -> list[dict[str, str]]:
    """Loss, validation metric, speed and learning rate over steps; those without points are left out."""
    figures = []
    if run.steps:
        figures.append(
            {
                "title": "Training loss",
                "note": "per supervised position",
                "svg": curve("loss", "Training loss over steps", *_series(run.steps, "loss")),
            }
        )
    for metric in ("ndcg@10", words.headline_metric(run)):
        rows = [
            (r["step"], r["evaluation"][metric])
            for r in run.evaluations
            if isinstance(r["evaluation"].get(metric), (int, float))
        ]
        if rows:
            best = run.results["model"].get("best_step")
            figures.append(
                {
                    "title": f"Validation {words.metric_label(metric)}",
                    "note": "ring: the step kept" if best in [r[0] for r in rows] else "",
                    "svg": curve(
                        "validation",
                        f"Validation {metric} at each evaluation",
                        *zip(*rows, strict=True),
                        ceiling=run.ceiling.get(metric),
                        ceiling_label="ceiling (test)",
                        markers=len(rows) <= 40,
                        mark=best,
                    ),
                }
            )
            break
    x, y = _series(run.steps, "tokens_per_s")
    if x:
        figures.append(
            {
                "title": "Speed",
                "note": "tokens a second",
                "svg": curve("speed", "Tokens a second over steps", x, y, zero=True),
            }
        )
    x, y = _series(run.steps, "lr")
    if x:
        figures.append(
            {
                "title": "Learning rate",
                "note": "× 10⁻³",
                "svg": curve("lr", "Learning rate over steps", x, [v * 1e3 for v in y], zero=True),
            }
        )
    return figures


def _series(rows: list[dict[str, Any]], field: str) -> tuple[list[float], list[float]]:
    found = [
        (r["step"], r[field])
        for r in rows
        if isinstance(r.get(field), (int, float)) and abs(r[field]) != float("inf") and r[field] == r[field]
    ]
    return [f[0] for f in found], [f[1] for f in found]


def _facts(run: RunData) -> list[tuple[str, str]]:
    """The training in numbers."""
    model = run.results["model"]
    dense, tables = model.get("parameters_dense"), model.get("parameters_tables")
    flops, seconds = model.get("model_flops"), model.get("seconds")
    facts = [
        ("Parameters in layers", words.count(dense)),
        ("Parameters in tables", words.count(tables)),
        ("Step kept", words.count(model.get("best_step"))),
        ("Epochs run", words.count(model.get("epochs_run"))),
        ("Training time", words.duration(seconds)),
        ("Tokens a second", words.count(round(model["tokens_per_s"])) if model.get("tokens_per_s") else "–"),
        ("Model FLOPs in all", words.with_unit(flops, "FLOP")),
        ("Model FLOPs a second", words.with_unit(flops / seconds, "FLOP/s") if flops and seconds else "–"),
    ]
    return [fact for fact in facts if fact[1] != "–"]


def _statistics(data: dict[str, Any]) -> list[tuple[str, str]]:
    known = {
        "users": "Users",
        "items": "Items",
        "events": "Events",
        "train_events": "Training events",
        "valid_targets": "Validation targets",
        "test_targets": "Test targets",
        "mean_length": "Mean history",
        "median_length": "Median history",
        "density": "Density",
        "has_times": "Timestamps",
    }
    rows = []
    for key, label in known.items():
        if data.get(key) is not None:
            value = f"{100 * data[key]:.3g} %" if key == "density" else words.count(data[key])
            rows.append((label, value))
    return rows


def _example(example: dict[str, Any]) -> dict[str, Any]:
    target = example.get("target")
    shown = [{**item, "hit": item.get("title") == target} for item in example.get("recommended") or []]
    history = example.get("history") or []
    return {
        "user": example.get("user"),
        "history": history[-10:],
        "earlier": max(0, len(history) - 10),
        "target": target,
        "recommended": shown,
        "found": any(item["hit"] for item in shown),
    }


def _grids(grids: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One table per baseline, best setting first; the one that was chosen is marked."""
    tables = []
    for kind, rows in grids.items():
        columns = [c for c in (rows[0] if rows else {}) if c not in ("setting", "chosen")]
        metric = next((c for c in columns if c != "users"), None)

        def score(row: dict[str, Any], metric: str | None = metric) -> float:
            value = row.get(metric)
            return value if isinstance(value, (int, float)) else float("-inf")

        ordered = sorted(rows, key=score, reverse=True)
        best = next((row for row in ordered if row.get("chosen")), ordered[0] if ordered else None)
        lines = [
            {"setting": r.get("setting", ""), "values": [r.get(c) for c in columns], "best": r is best} for r in ordered
        ]
        if lines:
            tables.append({"kind": kind, "columns": columns, "rows": lines})
    return tables


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in _flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)))]
    return [(prefix, str(value))]
