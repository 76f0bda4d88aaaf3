"""Memory, time and disk that preparing a large log takes, as ``gr-prepare`` does it.

    python -m benchmarks.data.out_of_core --work FOLDER [--rows 100000000]

A seeded log is written below ``--work`` (8 GB for 100 million rows, temporary files included), a process of its own
prepares it, and another reads the prepared store; both are watched through ``/proc`` and the folder is removed. The
row goes to ``benchmarks/results/out_of_core_<date>.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.data.large_log import write_large_log
from benchmarks.memory import memory
from benchmarks.written import append_row, dated
from gr.training.environment import describe

CONFIG = """
import sys
from gr.data.store import read_store
from gr.data.table import Table, TableConfig
path, folder, core, least = sys.argv[1:]
table = Table(TableConfig(path=path, core=core, min_user_events=int(least), min_item_events=int(least)))
"""
PARTS = {"prepare": "table.fingerprint(); table.prepare(folder)", "read": "store = read_store(folder)"}


def main() -> None:
    """Runs the measurement once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and the store, on a large disk")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--core", choices=["once", "iterated"], default="once")
    parser.add_argument("--min-events", type=int, default=1, help="both minima")
    parser.add_argument("--json", type=Path, help="where to append the row")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        row = measure(Path(work), arguments)
    append_row(arguments.json or dated("out_of_core", "jsonl"), row)
    print(json.dumps(row, indent=1))


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the results file."""
    a = arguments
    size = write_large_log(work / "log", a.rows, a.users, a.items, a.files, a.seed)
    command = [str(work / "log"), str(work / "store" / "prepared"), a.core, str(a.min_events)]
    parts = {name: watch(code, command, work / "store") for name, code in PARTS.items()}
    manifest = json.loads((work / "store" / "prepared" / "manifest.json").read_text())
    stored = sum(f.stat().st_size for f in (work / "store" / "prepared").iterdir())
    return {
        "measurement": "out_of_core",
        "rows": a.rows,
        "parameters": {k: getattr(a, k) for k in ("users", "items", "files", "seed", "core", "min_events")},
        "input_bytes": size,
        "store_bytes": stored,
        "counts": manifest["counts"],
        "repairs": manifest["repairs"],
        "content_hash": manifest["content_hash"],
        **parts,
        "includes": "hashing the input, as gr-prepare does, and starting Python; read: users and items stay in memory",
        "environment": {**describe(), "command": "benchmarks.data.out_of_core " + _command(a)},
    }


def watch(code: str, command: list[str], folder: Path) -> dict[str, float]:
    """Runs Python code in a process of its own; samples its memory, and the bytes below ``folder``.

    Returns:
        ``seconds``, ``cpu_seconds``, ``peak_rss_gib`` (VmHWM, file pages included), ``peak_anon_gib`` (largest
        RssAnon seen, every 0.1 s), ``peak_folder_bytes`` (largest seen, the store's own files included).
    """
    begin, before = time.perf_counter(), os.times()
    process = subprocess.Popen([sys.executable, "-c", CONFIG + code, *command], stdout=subprocess.DEVNULL)
    peak_rss = peak_anon = peak_bytes = 0
    while process.poll() is None:
        status = memory(process.pid)
        peak_rss = max(peak_rss, status.get("VmHWM", 0))
        peak_anon = max(peak_anon, status.get("RssAnon", 0))
        peak_bytes = max(peak_bytes, _size(folder))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the measured process ended with status {process.returncode}")
    after = os.times()
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1),
        "peak_rss_gib": round(peak_rss / 2**30, 3),
        "peak_anon_gib": round(peak_anon / 2**30, 3),
        "peak_folder_bytes": peak_bytes,
    }


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # removed meanwhile
            continue
    return total


def _command(arguments: argparse.Namespace) -> str:
    given = {k.replace("_", "-"): v for k, v in vars(arguments).items() if k not in ("work", "json")}
    return "--work FOLDER " + " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in given.items())


if __name__ == "__main__":
    main()
