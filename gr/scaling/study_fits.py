"""A table's models, each with its fit: the one on disk if it is of this table, else made now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gr.scaling.fit import fit_runs
from gr.scaling.store import read_json
from gr.scaling.table import fits_path, read_rows, read_runs, read_timings, table_hash
from gr.scaling.terms import fit_term


def variants(table: Path) -> list[str | None]:
    """Names by the alphabet; ``[None]`` where it has one model or no column.

    Raises:
        UserError: No such file.
    """
    found = list(dict.fromkeys(row.get("variant") or "" for row in read_rows(table)[0]))
    return sorted(found) if len(found) > 1 else [None]


def fit_table(
    table: Path, variant: str | None, samples: int, terms: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs of one model, and their fit as ``gr-scaling fit`` writes it."""
    rows, excluded = read_runs(table, variant)
    further = {term: fit_term(rows, term, samples) for term in terms}
    found = fit_runs(rows, samples) | {"terms": further}
    return rows, {"table": table_hash(table), "variant": variant, "excluded": excluded, **found}


def read_fits(table: Path, samples: int) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Runs and fit of each model; the name is empty where there is one.

    Args:
        table: ``runs.csv``.
        samples: Bootstrap samples of a fit that is made here.
    """
    found = {}
    timings = read_timings(table)
    for variant in variants(table):
        fitted = read_json(fits_path(table, variant))
        if isinstance(fitted, dict) and fitted.get("table") == table_hash(table):
            found[variant or ""] = (read_runs(table, variant)[0], fitted)
        else:
            print(f"fitting {variant or table}, {samples} bootstrap samples: no fit of it lies beside the table",
                  file=sys.stderr, flush=True)  # fmt: skip
            found[variant or ""] = fit_table(table, variant, samples)
        for row in found[variant or ""][0]:
            row |= {name: timings.get(row["run_id"], {}).get(name) for name in ("train_seconds", "mfu", "code")}
    return found
