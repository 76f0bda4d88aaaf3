"""Logarithmic buckets of time differences: integers compared with the buckets' integer edges."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Above 2**53 a float64 no longer holds every integer, so the definition of a bucket ends there.
LARGEST_EXACT = 2**53
NARROW = 2**31 - 1
"""Times of 32 bits lie in [0, NARROW), so that no distance needs more, and every one of them is below this number."""


def time_bucket(seconds: Tensor, width: float, num_buckets: int) -> Tensor:
    """``clamp(floor(ln(max(|x|, 1)) / width), 0, num_buckets - 1)`` of integer seconds up to 2**53.

    A binary search among the buckets' integer edges; these are made with double precision's logarithm, which is exact
    below 5e13 seconds at the default width.

    Returns:
        int32 of the same shape.
    """
    edges = edge_tensor(width, num_buckets, torch.int64, seconds.device)
    return torch.bucketize(seconds.long().abs().contiguous(), edges, right=True, out_int32=True)


@cache
def bucket_edges(width: float, num_buckets: int) -> tuple[int, ...]:
    """Smallest integer of each bucket above 0: the number of edges <= x is floor(ln(x) / width),
    in double precision."""

    def bucket(x: int) -> int:
        return math.floor(math.log(x) / width)

    edges = []
    for k in range(1, num_buckets):
        if k * width > math.log(LARGEST_EXACT):
            break
        x = max(int(math.exp(k * width)), 1)
        while bucket(x) < k:
            x += 1
        while x > 1 and bucket(x - 1) >= k:
            x -= 1
        edges.append(x)
    return tuple(edges)


@cache
def edge_tensor(width: float, num_buckets: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The edges in the times' dtype, int64 or int32, where those that no distance reaches are ``NARROW``.

    Made once: a copy to a GPU from pageable memory in each forward would wait for it.
    """
    edges = bucket_edges(width, num_buckets)
    if dtype == torch.int32:
        edges = tuple(min(edge, NARROW) for edge in edges)
    with torch.inference_mode(False):
        return torch.tensor(edges, dtype=dtype, device=device)
