"""Rows that differ in number between ranks: everybody's rows to all, and products back to their owners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Everybody:
    """How many rows each rank brought.

    Attributes:
        counts: Rows of each rank.
        rank: This one.
    """

    counts: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, count: int, device: torch.device) -> Everybody:
        """Asks all ranks; a collective."""
        world, rank = dist.get_world_size(), dist.get_rank()
        counts = torch.zeros(world, dtype=torch.int64, device=device)
        counts[rank] = count
        dist.all_reduce(counts)
        return cls(tuple(counts.tolist()), rank)

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Where this rank's rows stand among everybody's."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """(n, ...) own rows -> (total, ...) everybody's, in order of ranks; without gradient."""
        longest = max(self.counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows.detach()
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def give_back(self, blocks: Tensor, widths: list[int]) -> Tensor:
        """(total, width of this rank) numbers for everybody's rows -> (n, sum of widths) for the own rows.

        Args:
            blocks: This rank's columns for all rows.
            widths: Columns of each rank; they are joined in order of ranks.
        """
        own = self.counts[self.rank]
        received = blocks.new_empty(own * sum(widths))
        sent = [count * widths[self.rank] for count in self.counts]
        dist.all_to_all_single(received, blocks.contiguous().view(-1), [own * width for width in widths], sent)
        parts = received.split([own * width for width in widths])
        return torch.cat([part.view(own, width) for part, width in zip(parts, widths, strict=True)], dim=1)
