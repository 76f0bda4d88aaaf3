"""Ids hashed into the rows of a smaller table: ids of one row share its vector and cannot be told apart.

The hash is splitmix64's finaliser (Steele, Lea and Flood 2014) of the id plus the table's key, reduced to the rows. The
key is the first 8 bytes of the SHA-256 of the table's name, so that tables hash independently of each other. Both are
fixed by these lines: an id has the same row on every machine and device and in every version.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 20


def key_of(table: str) -> int:
    """A table's key, a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256(table.encode()).digest()[:8], "little", signed=True)


def hashed(ids: Tensor, num_rows: int, key: int) -> Tensor:
    """Rows (...,) int64 in 0..num_rows-1 of ids (...,) int64; the top 63 bits modulo ``num_rows``.

    A row is off the same probability by at most num_rows / 2**63 of itself.
    """
    word = ids + key  # int64 arithmetic wraps as unsigned arithmetic does
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(word ^ _shifted(word, 31), 1) % num_rows


def ids_of_rows(num_ids: int, num_rows: int, key: int) -> np.ndarray:
    """(num_rows,) int64, how many of the ids 0..num_ids-1 have each row."""
    counts = torch.zeros(num_rows, dtype=torch.int64)
    for lo in range(0, num_ids, _BLOCK):
        rows = hashed(torch.arange(lo, min(lo + _BLOCK, num_ids)), num_rows, key)
        counts.index_add_(0, rows, torch.ones_like(rows))
    return counts.numpy()


def sharing(counts: np.ndarray) -> float:
    """The collision rate: the share of ids that have a row together with another id, given ``ids_of_rows``."""
    return 1.0 - int((counts == 1).sum()) / int(counts.sum())


def expected_sharing(num_ids: int, num_rows: int) -> float:
    """What ``sharing`` is in the mean over all hash functions: 1 - (1 - 1/num_rows)^(num_ids - 1)."""
    if num_rows == 1:
        return float(num_ids > 1)
    return -math.expm1((num_ids - 1) * math.log1p(-1.0 / num_rows))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shifted to the right with zeros coming in, as for an unsigned number."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
