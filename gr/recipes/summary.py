"""What ``gr-train`` prints when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_summary(results: dict[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """The table of models and baselines, the audit, and where to look next."""
    console = console or Console()
    label, best = results["model"]["label"], results["ceiling"]
    seen = ", less those already seen" if results["protocol"]["mask_seen"] else ""
    title = (
        f"{results['name']}: {results['data']['test_targets']:,} test users, all "
        f"{results['protocol']['num_candidates']:,} items ranked{seen}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "HR@10", "± 95 %", "NDCG@10", "MRR") + (("% of best",) if best else ()):
        table.add_column(name, justify="left" if not name else "right")
    rows = sorted(results["metrics"].items(), key=lambda row: -row[1]["hr@10"]["mean"])
    for name, metrics in rows:
        hit = metrics["hr@10"]
        cells = [escape(name), f"{hit['mean']:.4f}", f"{1.96 * hit['se']:.4f}", f"{metrics['ndcg@10']['mean']:.4f}",
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
    for caveat in results["data"]["caveats"]:
        console.print(f"caveat: {escape(caveat)}")
    if results["audit"]:
        for finding in results["audit"]:
            console.print(f"[red]leak audit: {escape(finding['name'])}: {escape(finding['detail'])}[/red]")
    else:
        console.print("leak audit: nothing found")
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True)
    console.print(f"next:   gr-recommend {run_dir}", soft_wrap=True)
