"""Ranks on disk: one Parquet row a target, so that every metric can be computed again without the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import UserError
from gr.evaluation.ranking import COLUMNS, Ranks
from gr.files import replacing


def save_ranks(ranks: Ranks, path: str | Path) -> None:
    """Writes user, position, target, better, tied, candidates (int64) and rank (float64)."""
    path = Path(path)
    columns = {name: getattr(ranks, name) for name in COLUMNS} | {"rank": ranks.rank}
    table = pa.table(columns).replace_schema_metadata({"num_items": str(ranks.num_items)})
    try:
        with replacing(path) as aside:
            pq.write_table(table, aside)
    except OSError as error:
        raise UserError(f"ranks file {path} cannot be written: {error}") from None


def load_ranks(path: str | Path) -> Ranks:
    """Reads what ``save_ranks`` wrote.

    Raises:
        UserError: The file is missing, is not Parquet or lacks a column.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"ranks file {path} does not exist; evaluating the run writes it") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"ranks file {path} cannot be read: {str(error).splitlines()[0]}") from None
    lacking = [name for name in COLUMNS if name not in table.column_names]
    metadata = table.schema.metadata or {}
    if lacking or b"num_items" not in metadata:
        what = f"column {lacking[0]}" if lacking else "its num_items entry"
        raise UserError(f"ranks file {path} lacks {what}; evaluate the run again to write it")
    arrays = {name: np.asarray(table[name].to_numpy(), dtype=np.int64) for name in COLUMNS}
    return Ranks(**arrays, num_items=int(metadata[b"num_items"]))
