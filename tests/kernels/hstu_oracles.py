"""What HSTU attention is, one pair at a time, written from the rules and not from the code under test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gr.kernels.hstu_attention import Mask


def loop_ids(length: int, c: int, t: int) -> tuple[list[int], int]:
    """Position ids of one sequence and the id of its targets, one token at a time."""
    last = length - c + 1 - t if c > 0 else length - t
    ids = [max(pos - c + 1, 0) if c > 0 else pos for pos in range(length)]
    return [min(p, last) for p in ids], last


def loop_mask(length: int, c: int, t: int, mask: Mask) -> list[list[bool]]:
    """The mask of one sequence by its rules, one pair at a time; of ``mask`` only what is no tensor is read."""
    ids, last = loop_ids(length, c, t)
    first_target = length - t
    group = mask.target_group
    seen = [[False] * length for _ in range(length)]
    for i in range(length):
        for j in range(length):
            is_target = j >= first_target
            ok = i == j or (ids[i] > ids[j] if mask.causal else not is_target)
            if group and is_target and i >= first_target:
                ok = ok or ((i - first_target) // group == (j - first_target) // group and (j <= i or not mask.causal))
            if mask.window:
                free = bool(mask.full_tail) and ids[i] >= last - mask.full_tail
                ok = ok and (abs(ids[i] - ids[j]) <= mask.window or free)
            if c > 0 and ids[i] == 0 and ids[j] < last:
                ok = True
            seen[i][j] = ok
    return seen


@dataclass(frozen=True)
class Row:
    """One sequence of a call: where its tokens are and what they are."""

    number: int
    queries: range  # in q
    keys: range  # in k and v
    num_contextual: int
    num_targets: int

    @property
    def shift(self) -> int:
        """Position of the first query."""
        return len(self.keys) - len(self.queries)


def rows_of(arguments: dict[str, Any]) -> Iterator[Row]:
    """The sequences of a call."""
    q_offsets, mask = arguments["q_offsets"].tolist(), arguments["mask"]
    kv_offsets = q_offsets if arguments["kv_offsets"] is None else arguments["kv_offsets"].tolist()
    for row in range(len(q_offsets) - 1):
        counts = (0 if n is None else int(n[row]) for n in (mask.num_contextual, mask.num_targets))
        yield Row(row, range(*q_offsets[row : row + 2]), range(*kv_offsets[row : row + 2]), *counts)


def loop_bucket(seconds: int, width: float, num_buckets: int) -> int:
    """The formula of a time bucket."""
    return min(math.floor(math.log(max(abs(seconds), 1)) / width), num_buckets - 1)


def loop_divisor(divisor: Any, row: Row, query: int, num_visible: int, num_rows: int) -> Any:
    """What the sum of one query is divided by."""
    if isinstance(divisor, str):
        return max(num_visible, 1)
    if not isinstance(divisor, Tensor):
        return divisor
    by_row = divisor.shape == (num_rows,)
    return divisor.flatten()[row.number if by_row else query]


def loop_attention(arguments: dict[str, Any]) -> Tensor:
    """The operator by loops over rows, queries and keys; gradients by autograd."""
    q, k, v, alpha, bias = (arguments[name] for name in ("q", "k", "v", "alpha", "bias"))
    num_rows = arguments["q_offsets"].shape[0] - 1
    out = [torch.zeros(0)] * q.shape[0]
    for row in rows_of(arguments):
        length, c, t = len(row.keys), row.num_contextual, row.num_targets
        seen = loop_mask(length, c, t, arguments["mask"])
        ids = list(range(length))
        if bias is not None and bias.position_ids == "target_clamped":
            ids, _ = loop_ids(length, c, t)
        for i, a in enumerate(row.queries, start=row.shift):
            total = v.new_zeros(v.shape[1:])
            for j, b in enumerate(row.keys):
                if not seen[i][j]:
                    continue
                score = alpha * (q[a] * k[b]).sum(-1)
                if bias is not None and bias.position_table is not None:
                    largest = bias.position_table.shape[-1] - 1
                    score = score + bias.position_table[..., min(max(ids[j] - ids[i] + largest // 2, 0), largest)]
                if bias is not None and bias.time_table is not None:
                    seconds = int(bias.query_times[a]) - int(bias.key_times[b])
                    entries = bias.time_table.shape[-1]
                    score = score + bias.time_table[..., loop_bucket(seconds, bias.bucket_width, entries)]
                total = total + (score * torch.sigmoid(score))[:, None] * v[b]
            out[a] = total / loop_divisor(arguments["divisor"], row, a, sum(seen[i]), num_rows)
    return torch.stack(out)
