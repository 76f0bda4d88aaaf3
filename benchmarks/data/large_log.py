"""A log as large as asked for, in Parquet files, made in little memory, for ``benchmarks.data.out_of_core``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 1 << 20
FIRST_SECOND = 1_600_000_000
SECONDS = 2 * 365 * 86400


def write_large_log(folder: Path, rows: int, users: int, items: int, files: int, seed: int) -> int:
    """Writes ``part-00.parquet`` and so on; the same arguments write the same rows.

    A user's activity is log-normal (sigma 1.5), an item's popularity falls as 1 / rank. Rows come in random order
    of user and time, as from many servers; ids are spread over 40 bits, so that no order of theirs helps.

    Args:
        folder: Made if missing.
        rows: Events in all.
        users: Possible users; some get no event.
        items: Possible items.
        files: Files of equal size.
        seed: Of everything.

    Returns:
        Bytes written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    activity = np.cumsum(rng.lognormal(0.0, 1.5, users))
    popularity = np.cumsum(1.0 / np.arange(1, items + 1))
    user_ids, item_ids = _spread(np.arange(users)), _spread(np.arange(items) + users)
    for file in range(files):
        left = rows * (file + 1) // files - rows * file // files
        with pq.ParquetWriter(folder / f"part-{file:02d}.parquet", _SCHEMA, compression="zstd") as writer:
            while left:
                n = min(left, BATCH)
                left -= n
                user = np.searchsorted(activity, rng.random(n) * activity[-1], side="right")
                item = np.searchsorted(popularity, rng.random(n) * popularity[-1], side="right")
                time = FIRST_SECOND + rng.integers(0, SECONDS, n)
                columns = [user_ids[np.minimum(user, users - 1)], item_ids[np.minimum(item, items - 1)], time]
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    return sum(f.stat().st_size for f in folder.iterdir())


_SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])


def _spread(number: np.ndarray) -> np.ndarray:
    """Different ids below 2**40: an odd factor has an inverse modulo a power of two."""
    return (number.astype(np.int64) * 0x9E3779B97F % (1 << 40)).astype(np.int64)
