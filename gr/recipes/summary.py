"""What ``gr-train`` prints when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table


def print_summary(results: dict[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """The table of models and baselines, the audit, and where to look next."""
    console = console or Console()
    label, best = results["model"]["label"], results["ceiling"]
    table = Table(title=_title(results, results["data"]["test_targets"], "test"), title_justify="left")
    for name in ("", "HR@10", "± 95 %", "NDCG@10", "MRR") + (("% of best",) if best else ()):
        table.add_column(name, justify="left" if not name else "right")
    rows = sorted(results["metrics"].items(), key=lambda row: -row[1]["hr@10"]["mean"])
    for name, metrics in rows:
        hit = metrics["hr@10"]
        half = (hit["high"] - hit["low"]) / 2
        cells = [escape(name), f"{hit['mean']:.4f}", f"{half:.4f}", f"{metrics['ndcg@10']['mean']:.4f}",
                 f"{metrics['mrr']['mean']:.4f}"]  # fmt: skip
        if best:
            cells.append(f"{100 * hit['mean'] / best['hr@10']:.1f}")
        table.add_row(*cells, style="bold" if name == label else "")
    if best:
        table.add_section()
        table.add_row(
            "best possible", f"{best['hr@10']:.4f}", "", f"{best['ndcg@10']:.4f}", f"{best['mrr']:.4f}", "100.0"
        )
        blind = results.get("ceiling_without_times")
        if blind:
            share = f"{100 * blind['hr@10'] / best['hr@10']:.1f}"
            table.add_row(
                "best without times",
                f"{blind['hr@10']:.4f}",
                "",
                f"{blind['ndcg@10']:.4f}",
                f"{blind['mrr']:.4f}",
                share,
            )
    console.print(table)
    _caveats_and_audit(results, console)
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True)
    console.print(f"next:   gr-recommend {run_dir}", soft_wrap=True)


def print_evaluation(
    results: dict[str, Any], folder: Path, ks: Sequence[int] = (10,), console: Console | None = None
) -> None:
    """What ``gr-evaluate`` prints: everybody's metrics with intervals, then the model's on each slice."""
    console = console or Console()
    label, metrics, best = results["model"]["label"], results["metrics"], results["ceiling"]
    part = {"valid": "validation"}.get(results["part"], results["part"])
    names = [*(f"hr@{k}" for k in ks), *(f"ndcg@{k}" for k in ks), "mrr"]
    heads = [head for name in names for head in ([name.upper(), "95 %"] if name in WITH_INTERVAL else [name.upper()])]
    table = _plain_table(_title(results, results["targets"], part), heads)
    for row, found in sorted(metrics.items(), key=lambda one: -one[1]["hr@10"]["mean"]):
        table.add_row(escape(row), *_cells(found, names), style="bold" if row == label else "")
    if best:
        table.add_section()
        cells = [[f"{best[name]:.4f}", ""] if name in WITH_INTERVAL else [f"{best[name]:.4f}"] for name in names]
        table.add_row("best possible", *(cell for pair in cells for cell in pair))
    _print_whole(console, table)

    rival = (results["comparison"] or {}).get("rival")
    heads = ["targets", "HR@10", "95 %", "NDCG@10", "95 %", *([str(rival)] if rival else [])]
    title = f"{label} by slice" + (f", and the NDCG@10 of {rival}" if rival else "")
    table = _plain_table(title, heads)
    others = results["slices"].get(rival, results["slices"][label])
    group = None
    for one, other in zip(results["slices"][label], others, strict=True):
        if group not in (None, one["group"]):
            table.add_section()
        group = one["group"]
        cells = [f"{one['num']:,}", *_cells(one["metrics"], WITH_INTERVAL)]
        table.add_row(one["name"], *cells, *([f"{other['metrics']['ndcg@10']['mean']:.4f}"] if rival else []))
    _print_whole(console, table)
    console.print(f"weights: {escape(results['weights'])}")
    _caveats_and_audit(results, console)
    console.print(f"written: {folder / 'results.json'}", soft_wrap=True)


WITH_INTERVAL = ("hr@10", "ndcg@10")


def _cells(metrics: dict[str, dict[str, float]], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        found = metrics[name]
        cells.append(f"{found['mean']:.4f}")
        if name in WITH_INTERVAL:
            cells.append(f"{found['low']:.3f}-{found['high']:.3f}")
    return cells


def _plain_table(title: str, heads: Sequence[str]) -> Table:
    """A first column of names, then numbers; narrow enough for a terminal of 80 columns."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(escape(head), justify="right", no_wrap=True)
    return table


def _print_whole(console: Console, table: Table) -> None:
    """Numbers are never cut: a table wider than the terminal is printed as wide as it is."""
    wide = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    before, console.width = console.width, max(console.width, wide)
    console.print(table)
    console.width = before


def _title(results: dict[str, Any], num: int, part: str) -> str:
    seen = {False: "", True: ", less those already seen", "window": ", less those among the latest events"}
    rule = seen[results["protocol"]["mask_seen"]]
    return f"{results['name']}: {num:,} {part} users, all {results['protocol']['num_candidates']:,} items ranked{rule}"


def _caveats_and_audit(results: dict[str, Any], console: Console) -> None:
    for caveat in results["data"]["caveats"]:
        console.print(f"caveat: {escape(caveat)}")
    if results["audit"]:
        for finding in results["audit"]:
            console.print(f"[red]leak audit: {escape(finding['name'])}: {escape(finding['detail'])}[/red]")
    else:
        console.print("leak audit: nothing found")


def print_comparison(found: dict[str, Any], console: Console | None = None) -> None:
    """What ``gr-compare`` prints: both scores with their seeds, the difference, and the difference on slices."""
    console = console or Console()
    metric = found["metric"].upper()
    for letter in ("a", "b"):
        side = found[letter]
        console.print(f"{letter.upper()}: {escape(side['name'])}: {metric} {side['score']:.4f}", soft_wrap=True)
        if side["sd_over_seeds"] is not None:
            scores = ", ".join(f"seed {run['seed']}: {run['score']:.4f}" for run in side["runs"])
            console.print(f"   {scores}; sd over seeds {side['sd_over_seeds']:.4f}", soft_wrap=True)
    whole = found["difference"]
    console.print(
        f"A - B: {_difference(whole)}, p = {_p(whole['p'])} (paired bootstrap over {whole['users']:,} users)",
        soft_wrap=True,
    )
    if any(found[letter]["sd_over_seeds"] is not None for letter in ("a", "b")):
        console.print("The interval is over users, for these very seeds; other seeds vary by the sd beside them.")
    else:
        console.print("One run each: another seed of either would move the difference, too.")
    if found["slices"] is None:
        return
    title = f"{metric} by slice; p adjusted for {sum('p_holm' in row for row in found['slices'])} slices (Holm)"
    table = _plain_table(title, ("targets", "A", "B", "A - B", "95 %", "p"))
    group = None
    for row in found["slices"]:
        if group not in (None, row["group"]):
            table.add_section()
        group = row["group"]
        interval = "too few users" if row["p"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        table.add_row(
            row["name"],
            f"{row['num']:,}",
            f"{row['a']:.4f}",
            f"{row['b']:.4f}",
            f"{row['difference']:+.4f}",
            interval,
            "" if row["p"] is None else _p(row["p_holm"]),
        )
    _print_whole(console, table)


def _difference(row: dict[str, Any]) -> str:
    interval = "" if row["p"] is None else f", 95 % interval {row['low']:+.4f} to {row['high']:+.4f}"
    return f"{row['difference']:+.4f}{interval}"


def _p(value: float | None) -> str:
    return "not known, too few users" if value is None else f"{value:.2g}"
